"""nftables by libnftables: one context kept open, text commands, elements of maps and sets.

A context belongs to the network namespace in which its thread was when it was made. This is the one place where
libnftables' errors become `KernelError`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import nftables

from netstore.errors import KernelError
from netstore.kernel.attributes import NETLINK_NETFILTER

__all__ = ["Nftables", "is_ours"]

_ERRNOS = {os.strerror(code): code for code in (
    errno.ENOENT, errno.EEXIST, errno.EBUSY, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSPC, errno.ENOMEM, errno.EINVAL
)}  # fmt: skip

_ours: set[int] = set()  # sockets of contexts live as long as we do


class Nftables:
    """A context of the namespace in which it was made. Safe for several threads."""

    def __init__(self) -> None:
        self._nft = nftables.Nftables()
        self._lock = threading.Lock()

    def run(self, commands: Sequence[str], *, doing: str = "changing the firewall") -> None:
        """Run commands in one transaction: all of them, or none.

        Raises:
            KernelError: errno is what libnftables said, EINVAL when it did not say.
        """
        if not commands:
            return
        with self._lock:
            status, _, text = self._nft.cmd("\n".join(commands))
        if status:
            raise _mapped(text, doing, commands)

    def run_each(self, commands: Sequence[str], *, tolerate: Sequence[int], doing: str) -> None:
        """Run commands in one transaction; if it is refused, one by one, passing over the errors tolerated."""
        try:
            self.run(commands, doing=doing)
        except KernelError as error:
            if error.errno not in tolerate:
                raise
            for command in commands:
                try:
                    self.run([command], doing=doing)
                except KernelError as single:
                    if single.errno not in tolerate:
                        raise

    def json(self, command: str) -> list[dict[str, Any]] | None:
        """Return the objects that a list command finds (libnftables-json(5)), None when what it names is missing."""
        with self._lock:
            self._nft.set_json_output(True)
            try:
                status, output, text = self._nft.cmd(command)
            finally:
                self._nft.set_json_output(False)
        if status:
            error = _mapped(text, "reading the firewall", [command])
            if error.errno == errno.ENOENT:
                return None
            raise error
        return cast("list[dict[str, Any]]", msgspec.json.decode(output)["nftables"])


def is_ours(port: int) -> bool:
    """Say whether a netfilter socket of this process has that address: the nlmsg_pid of who caused a notification."""
    if port not in _ours:
        own = set()
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                own.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        for line in Path("/proc/thread-self/net/netlink").read_text().splitlines()[1:]:
            _, protocol, address, *_, inode = line.split()
            if int(protocol) == NETLINK_NETFILTER and int(address) == port and f"socket:[{inode}]" in own:
                _ours.add(port)
    return port in _ours


def _mapped(text: str, doing: str, commands: Sequence[str]) -> KernelError:
    first = next((line for line in text.splitlines() if line.strip()), "no reason given")
    code = next((code for reason, code in _ERRNOS.items() if reason in first), errno.EINVAL)
    return KernelError(code, doing, commands[0][:120], hint=f"libnftables says: {first.strip()}")
