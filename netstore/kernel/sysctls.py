"""Settings below /proc/sys/net of this thread's network namespace (Documentation/networking/ip-sysctl.rst)."""

from __future__ import annotations

import errno
import functools
from ipaddress import IPv6Address
from pathlib import Path

from netstore.errors import KernelError

__all__ = ["accept_ipv6", "forward_ipv6", "ipv6_present", "link_local", "raise_neighbour_limits", "sysctl"]

_IPV6 = Path("/proc/sys/net/ipv6/conf")


def sysctl(name: str, value: str) -> None:
    """Write one value, such as net/ipv4/ip_forward, when it differs.

    Raises:
        KernelError: there is no such setting, or it does not take the value.
    """
    path = Path("/proc/sys", name)
    try:
        if path.read_text().strip() != value:
            path.write_text(value)
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "setting sysctl", name.replace("/", ".")) from error


@functools.cache
@functools.cache
def ipv6_present() -> bool:
    """Say whether this kernel has IPv6 (the parameter ipv6.disable takes it away)."""
    return _IPV6.exists()


def accept_ipv6(interface: str) -> None:
    """Let an interface have IPv6 addresses, those that we give it and no other: router advertisements are not heard."""
    sysctl(f"net/ipv6/conf/{interface}/disable_ipv6", "0")
    sysctl(f"net/ipv6/conf/{interface}/accept_ra", "0")


def forward_ipv6() -> None:
    """Let the host forward IPv6, and go on hearing the routers that it hears.

    A host that forwards ignores router advertisements unless `accept_ra` is 2: its own default route would vanish.
    """
    if Path("/proc/sys/net/ipv6/conf/all/forwarding").read_text().strip() == "1":
        return
    for interface in _IPV6.iterdir():
        if interface.name != "all" and (interface / "accept_ra").read_text().strip() == "1":
            sysctl(f"net/ipv6/conf/{interface.name}/accept_ra", "2")
    sysctl("net/ipv6/conf/all/forwarding", "1")


def raise_neighbour_limits(place: Path = Path("/proc/sys/net")) -> None:
    """Let the neighbour tables hold a few thousand endpoints that talk to each other; a higher limit stays.

    The tables are one for all namespaces, and their limits are shown in the first one alone: elsewhere nothing happens.
    """
    for family in ("ipv4", "ipv6"):
        for name, wanted in (("gc_thresh3", 16384), ("gc_thresh2", 8192), ("gc_thresh1", 4096)):
            path = place / family / "neigh/default" / name
            try:
                if path.exists() and int(path.read_text()) < wanted:
                    path.write_text(str(wanted))
            except OSError as error:
                raise KernelError(error.errno or errno.EIO, "setting sysctl", str(path)) from error


def link_local(mac: str) -> str:
    """Return the link-local address of a MAC (RFC 4291, appendix A), which neighbour discovery sends from."""
    octets = bytes.fromhex(mac.replace(":", ""))
    return str(IPv6Address(b"\xfe\x80" + bytes(6) + bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]))
