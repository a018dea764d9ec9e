"""Fails when a relative link in a Markdown file leads nowhere."""

import pathlib
import re
import subprocess
import sys

LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
files = subprocess.run(["git", "ls-files", "*.md"], capture_output=True, text=True, check=True).stdout.split()
dead = [
    f"{name}: {target}"
    for name in files
    for target in LINK.findall(pathlib.Path(name).read_text())
    if not (pathlib.Path(name).parent / target).exists()
]
print("\n".join(dead))
sys.exit(bool(dead))
