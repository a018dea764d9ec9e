"""Interfaces of the daemon's own namespace: a socket for each thread, and deletions that share a grace period."""

from __future__ import annotations

import threading
from ipaddress import ip_address, ip_interface

from netstore.kernel.netlink import link_delete, link_delete_group, link_set
from netstore.kernel.route import RouteSocket
from netstore.model import NodeLink

__all__ = ["Deletions", "host_socket", "node_link"]

# Interfaces that wait to be deleted carry this group; nothing else may use it.
_GROUP = 0x6E736B64
_ENODEV = 19
_MAC_DIGITS = 17

_local = threading.local()


def host_socket() -> RouteSocket:
    """Return this thread's socket in the daemon's namespace, opened at first use."""
    found = getattr(_local, "socket", None)
    if found is None:
        found = _local.socket = RouteSocket()
    return found


def node_link(address: str) -> tuple[NodeLink, str, int]:
    """Return the link that the node's address on the underlay is on, with its interface's name and index.

    All is empty where no interface with a MAC has it.
    """
    route = host_socket()
    addresses = route.every_address()
    for index, held, length in addresses:
        if ip_address(held) == ip_address(address):
            subnet = str(ip_interface(f"{held}/{length}").network)
            own = [each for at, each, _ in addresses if at == index and ip_address(each).is_link_local and ":" in each]
            for link in route.links():
                if link.index == index and len(link.mac) == _MAC_DIGITS and link.mac.strip("0:"):
                    return NodeLink(mac=link.mac, subnet=subnet, link_local=min(own, default="")), link.name, index
    return NodeLink(), "", 0


class Deletions:
    """Deletes interfaces; callers that come while the kernel is busy share the next message.

    One deletion waits for an RCU grace period [16-20 ms]; 25 in one message take 31 ms together.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[str] = []
        self._running = False
        self._round = 0

    def delete(self, name: str) -> None:
        """Delete an interface and return when it is gone; one that is gone already is a success.

        Raises:
            KernelError: the kernel refused.
        """
        with self._changed:
            self._waiting.append(name)
            mine = self._round + (2 if self._running else 1)
            while self._running and self._round < mine:
                self._changed.wait()
            if self._round >= mine:
                return
            names, self._waiting, self._running = self._waiting, [], True
        try:
            self._delete(names)
        finally:
            with self._changed:
                self._running = False
                self._round += 1
                self._changed.notify_all()

    @staticmethod
    def _delete(names: list[str]) -> None:
        socket = host_socket()
        if len(names) == 1:
            socket.run([link_delete(names[0])])
            return
        socket.run([link_set(name, group=_GROUP, tolerate=frozenset({_ENODEV})) for name in names])
        socket.run([link_delete_group(_GROUP)])
