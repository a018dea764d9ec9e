"""The user that a container's process runs as: names of the image's own passwd and group files."""

from __future__ import annotations

import os
from dataclasses import dataclass

from netstore.errors import InvalidArgument, KernelError
from netstore.kernel.paths import closing, open_in_root

__all__ = ["Identity", "resolve"]

_MAX_FILE = 1 << 20
_MAX_ID = (1 << 31) - 1  # as Docker


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
        InvalidArgument: a name that the image does not have, or a number that is none of a user's or a group's.
    """
    name, _, group = user.partition(":")
    passwd, groups = _lines(rootfs, "/etc/passwd"), _lines(rootfs, "/etc/group")
    entry = next((line for line in passwd if line[0] == (name or "root") or (name and line[2:3] == [name])), None)
    if entry is None or len(entry) < 6:
        entry = [name, "x", name if name not in ("", "root") else "0", "0", "", "/"]
    uid = _number(entry[2], user, "a user of the image's /etc/passwd")
    of_group = "a group of the image's /etc/group"
    if group:
        found = next((line for line in groups if len(line) > 2 and line[0] == group), ["", "", group])
        return Identity(uid, _number(found[2], user, of_group), (), entry[5] or "/")
    member = (line for line in groups if len(line) > 3 and entry[0] and entry[0] in line[3].split(","))
    extra = tuple(int(line[2]) for line in member if _is_id(line[2]))
    return Identity(uid, _number(entry[3], user, of_group), extra, entry[5] or "/")


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= _MAX_ID


def _number(text: str, user: str, otherwise: str) -> int:
    """Parse an id. What is none must never become one: 0 is root."""
    if not _is_id(text):
        raise InvalidArgument("user", user, f"a number up to {_MAX_ID}, or {otherwise}")
    return int(text)


def _lines(rootfs: int, path: str) -> list[list[str]]:
    try:
        with closing(open_in_root(rootfs, path, os.O_RDONLY | os.O_NONBLOCK)) as file:
            text = os.read(file, _MAX_FILE).decode(errors="replace")
    except (KernelError, OSError):  # an image without the file has only numbers
        return []
    return [line.split(":") for line in text.splitlines() if line and not line.startswith("#")]
