"""What netstore keeps inside a sandbox besides interfaces: loopback up, and the sockets of its resolver.

And, in the host's own namespace, the socket of the relay of [::1].
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Sequence

from netstore.errors import KernelError
from netstore.kernel.namespaces import inside, open_pinned, socket_inside
from netstore.kernel.netlink import link_set
from netstore.kernel.paths import closing
from netstore.kernel.redirect import has_redirect, redirect, remove_redirect
from netstore.kernel.route import RouteSocket

__all__ = ["RESOLVER_ADDRESS", "close_resolver", "interface_names", "is_redirected", "lacking", "open_relay",
           "open_resolver", "raise_loopback", "ways_out"]  # fmt: skip

RESOLVER_ADDRESS = "127.0.0.11"
"""Where Docker's embedded resolver answers, and ours."""


def interface_names(namespace: int) -> set[str]:
    """Return the names of a namespace's interfaces [0.03 ms]."""
    with inside(namespace):
        return {name for _, name in socket.if_nameindex()}


def ways_out(namespace: int) -> set[str]:
    """Return the interfaces, other than `lo`, through which a namespace has default routes of either family [0.1 ms].

    "*" is an IPv4 route that refuses (`unreachable default`).
    """
    opened = []
    with inside(namespace):
        for name in ("route", "ipv6_route"):
            with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
                opened.append(os.open(f"/proc/thread-self/net/{name}", os.O_RDONLY | os.O_CLOEXEC))
    found = [_defaults(each) for each in opened]  # each is closed
    return set[str]().union(*found)


def _defaults(table: int) -> set[str]:
    """Read /proc/net/route (interface, destination, …, mask the eighth) or ipv6_route (destination, length, …)."""
    with os.fdopen(table) as lines:
        rows = [line.split() for line in lines]
    fourth = {row[0] for row in rows if row[1] == row[7] == "0" * 8}
    return fourth | {row[-1] for row in rows if row[0] == "0" * 32 and row[1] == "00" and row[-1] != "lo"}


def lacking(namespace: int, addresses: Sequence[str]) -> list[str]:
    """Return those of some addresses that a namespace does not have: nobody can be reached at them."""
    missing = []
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket_inside(namespace, family, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((address, 0))
            except OSError:
                missing.append(address)
    return missing


def raise_loopback(namespace: int) -> None:
    """Set `lo` up, which gives it 127.0.0.1/8."""
    with RouteSocket(socket_inside(namespace, socket.AF_NETLINK, socket.SOCK_RAW)) as route:
        route.run([link_set(1, up=True)])


def open_resolver(namespace: int) -> tuple[socket.socket, socket.socket]:
    """Open the UDP and the listening TCP socket of a sandbox's resolver, and redirect 127.0.0.11:53 to them.

    They listen on free ports, so that a container may still listen on port 53 of every address itself. Loopback is up
    already: `apply_endpoint` of every driver, or `raise_loopback`, has seen to it.

    Raises:
        KernelError: the kernel refused; nothing is left.
    """
    with inside(namespace):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        for each in (udp, tcp):
            each.setblocking(False)
            each.bind((RESOLVER_ADDRESS, 0))
        tcp.listen(64)
        redirect(namespace, RESOLVER_ADDRESS, udp.getsockname()[1], tcp.getsockname()[1])
    except BaseException as error:
        udp.close()
        tcp.close()
        if isinstance(error, OSError):
            raise KernelError(
                error.errno or errno.EIO, "opening the resolver's sockets on", RESOLVER_ADDRESS
            ) from error
        raise
    return udp, tcp


def open_relay() -> socket.socket | None:
    """Open the socket to which the firewall redirects [::1], None where the host has no IPv6."""
    listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(("::1", 0))
        listener.listen(4096)
    except OSError:
        listener.close()
        return None
    return listener


def is_redirected(path: str, inode: int) -> bool:
    """Say whether names are led to the resolver in a sandbox; of one that ended nobody asks, so that it is."""
    namespace = open_pinned(path, inode)
    if namespace is None:
        return True
    with closing(namespace):
        return has_redirect(namespace)


def close_resolver(namespace: int) -> None:
    """Take the redirect out of a sandbox that lives on without us; one that is gone is a success."""
    remove_redirect(namespace)
