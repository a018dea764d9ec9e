"""bundle.py SITE-PACKAGES: copies what netstore needs to run from this environment, the one of requirements.lock."""

import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

needed: set[str] = set()
new = ["netstore"]
while new:
    asked = [Requirement(each) for each in distribution(new.pop()).requires or []]
    names = {canonicalize_name(each.name) for each in asked if not each.marker or each.marker.evaluate({"extra": ""})}
    new += names - needed
    needed |= names
for file in (file for name in needed for file in distribution(name).files or []):
    if ".." in file.parts or file.suffix == ".pyc" or file.name == "RECORD":  # programs; caches; pip's own notes
        continue
    target = Path(sys.argv[1], file)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file.locate(), target)
