"""The user that a container's process runs as: names of the image's own passwd and group files."""

from __future__ import annotations

import os
from dataclasses import dataclass

from netstore.errors import InvalidArgument, KernelError
from netstore.kernel.paths import closing, open_in_root

__all__ = ["Identity", "resolve"]

_MAX_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class Identity:
    """Numbers of a user, its supplementary groups, its home."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def resolve(rootfs: int, user: str) -> Identity:
    """Return who "user[:group]" is in a root filesystem; names or numbers, "" is root.

    Raises:
        InvalidArgument: a name that the image does not have.
    """
    name, _, group = user.partition(":")
    passwd, groups = _lines(rootfs, "/etc/passwd"), _lines(rootfs, "/etc/group")
    entry = next(
        (line for line in passwd if line[0] == (name or "root") or (name.isdigit() and line[2:3] == [name])), None
    )
    if entry is None or len(entry) < 6:
        if not (name.isdigit() or name in ("", "root")):
            raise InvalidArgument("user", user, "a number, or a user of the image's /etc/passwd")
        entry = [name, "x", name if name.isdigit() else "0", "0", "", "/"]
    gid = _group(groups, group, user) if group else _number(entry[3])
    extra = () if group else tuple(
        _number(line[2]) for line in groups if len(line) > 3 and entry[0] and entry[0] in line[3].split(",")
    )  # fmt: skip
    return Identity(_number(entry[2]), gid, extra, entry[5] or "/")


def _group(groups: list[list[str]], group: str, user: str) -> int:
    found = next((line for line in groups if len(line) > 2 and line[0] == group), None)
    if found:
        return _number(found[2])
    if not group.isdigit():
        raise InvalidArgument("user", user, "a number, or a group of the image's /etc/group")
    return _number(group)


def _number(text: str) -> int:
    return int(text) if text.isdigit() and int(text) < 1 << 31 else 0


def _lines(rootfs: int, path: str) -> list[list[str]]:
    try:
        with closing(open_in_root(rootfs, path, os.O_RDONLY | os.O_NONBLOCK)) as file:
            text = os.read(file, _MAX_FILE).decode(errors="replace")
    except (KernelError, OSError):  # an image without the file has only numbers
        return []
    return [line.split(":") for line in text.splitlines() if line and not line.startswith("#")]
