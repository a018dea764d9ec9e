"""What netstore keeps inside a sandbox besides interfaces: loopback up, and the sockets of its resolver."""

from __future__ import annotations

import errno
import socket

from netstore.errors import KernelError
from netstore.kernel.namespaces import inside, socket_inside
from netstore.kernel.netlink import RouteSocket, link_set
from netstore.kernel.nftables import run_inside

__all__ = ["RESOLVER_ADDRESS", "close_resolver", "interface_names", "open_resolver", "raise_loopback"]

RESOLVER_ADDRESS = "127.0.0.11"
"""Where Docker's embedded resolver answers, and ours."""

_TABLE = "ip netstore"


def interface_names(namespace: int) -> set[str]:
    """Return the names of a namespace's interfaces [0.03 ms]."""
    with inside(namespace):
        return {name for _, name in socket.if_nameindex()}


def raise_loopback(namespace: int) -> None:
    """Set `lo` up, which gives it 127.0.0.1/8."""
    with RouteSocket(socket_inside(namespace, socket.AF_NETLINK, socket.SOCK_RAW)) as route:
        route.run([link_set(1, up=True)])


def open_resolver(namespace: int) -> tuple[socket.socket, socket.socket]:
    """Open the UDP and the listening TCP socket of a sandbox's resolver, and redirect 127.0.0.11:53 to them.

    They listen on free ports, so that a container may still listen on port 53 of every address itself.

    Raises:
        KernelError: the kernel refused; nothing is left.
    """
    raise_loopback(namespace)
    udp = socket_inside(namespace, socket.AF_INET, socket.SOCK_DGRAM)
    tcp = socket_inside(namespace, socket.AF_INET, socket.SOCK_STREAM)
    try:
        for each in (udp, tcp):
            each.setblocking(False)
            each.bind((RESOLVER_ADDRESS, 0))
        tcp.listen(64)
        redirects = [
            f"ip daddr {RESOLVER_ADDRESS} {protocol} dport 53 dnat to {RESOLVER_ADDRESS}:{each.getsockname()[1]}"
            for protocol, each in (("udp", udp), ("tcp", tcp))
        ]
        _redirect(namespace, redirects)
    except BaseException as error:
        udp.close()
        tcp.close()
        if isinstance(error, OSError):
            raise KernelError(
                error.errno or errno.EIO, "opening the resolver's sockets on", RESOLVER_ADDRESS
            ) from error
        raise
    return udp, tcp


def _redirect(namespace: int, redirects: list[str]) -> None:
    commands = [
        f"create table {_TABLE}",
        f"add chain {_TABLE} output {{ type nat hook output priority -100; }}",
        *(f"add rule {_TABLE} output {redirect}" for redirect in redirects),
    ]
    try:
        run_inside(namespace, commands, doing="redirecting names in a sandbox")
    except KernelError as error:
        if error.errno != errno.EEXIST:
            raise
        # A resolver before us left its table. Replacing it waits for a grace period [8-16 ms], so only then.
        run_inside(namespace, [f"delete table {_TABLE}", *commands], doing="redirecting names in a sandbox")


def close_resolver(namespace: int) -> None:
    """Take the redirect out of a sandbox that lives on without us; one that is gone is a success."""
    try:
        run_inside(namespace, [f"delete table {_TABLE}"], doing="removing the redirect of names")
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
