"""Write the option tables of docs/reference from the drivers' declarations; with --check, say which are stale."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from netstore.drivers.options import ENDPOINT_OPTIONS, Option

_MARK = re.compile(r"(<!-- options of (\S+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def table(name: str) -> str:
    """Return the Markdown table of a driver's options, of "volumes:" and a volume driver's, or of "endpoints"."""
    options: Sequence[Option] = ENDPOINT_OPTIONS
    kind, separator, of_volumes = name.partition(":")
    if separator:
        (point,) = entry_points(group=f"netstore.{kind.removesuffix('s')}_drivers", name=of_volumes)
        options = point.load().options
    elif name != "endpoints":
        (point,) = entry_points(group="netstore.drivers", name=name)
        options = point.load().options
    lines = ["| option | default | live | what it does |", "| --- | --- | --- | --- |"]
    for each in options:
        default = str(each.default).lower() if isinstance(each.default, bool) else each.default or ""
        lines.append(f"| `{each.key}` | {default} | {'yes' if each.live else ''} | {each.doc} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite every page that has a mark."""
    stale = []
    for page in sorted(Path("docs/reference").glob("*.md")):
        text = page.read_text()
        wanted = _MARK.sub(lambda match: match[1] + table(match[2]) + match[3], text)
        if wanted != text:
            stale.append(str(page))
            if "--check" not in sys.argv:
                page.write_text(wanted)
    if stale and "--check" in sys.argv:
        sys.exit(f"stale option tables: {', '.join(stale)}: run scripts/gen")


main()
