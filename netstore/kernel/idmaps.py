"""User namespaces that hold id mappings for mounts (user_namespaces(7), mount_setattr(2) MOUNT_ATTR_IDMAP)."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from netstore.errors import KernelError

__all__ = ["Ranges", "user_namespace"]

Ranges = Sequence[tuple[int, int, int]]
"""(first id as stored, first id as the mount shows it, how many)."""


def user_namespace(uids: Ranges, gids: Ranges) -> int:
    """Return a user namespace with these mappings; it lives as long as its descriptor, or a mount that has it.

    A process that does nothing else has to make it [2 ms]: a thread cannot, and the daemon does not fork.

    Raises:
        KernelError: the kernel refused: ranges that overlap, or no user namespaces.
    """
    holder = subprocess.Popen(
        ["unshare", "--user", "sh", "-c", "echo; read -r _"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert holder.stdin
        assert holder.stdout
        if not holder.stdout.readline():
            raise KernelError(errno.EPERM, "making", "a user namespace", hint="is user.max_user_namespaces above 0?")
        for name, ranges in (("uid_map", uids), ("gid_map", gids)):
            lines = "".join(f"{stored} {shown} {count}\n" for stored, shown, count in ranges)
            try:
                Path(f"/proc/{holder.pid}/{name}").write_text(lines)
            except OSError as error:
                raise KernelError(
                    error.errno or errno.EINVAL, "mapping ids by", lines.replace("\n", "; "),
                    hint="ranges must not overlap",
                ) from error  # fmt: skip
        return os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        holder.communicate(b"\n")
