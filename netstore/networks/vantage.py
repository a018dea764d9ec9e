"""The host, as a sandbox sees it: what `host.docker.internal` and `host-gateway` mean there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import ip_address, ip_interface

__all__ = ["host_addresses"]


def host_addresses(endpoints: Iterable[tuple[bool, Sequence[str], Sequence[str]]]) -> list[str]:
    """Return the host's addresses on one of a sandbox's networks, that of its default route where the host is there.

    An endpoint is given by: whether it has the default route, the host's addresses on its network, and its own with
    their prefix length. Those of other subnets than its own are left out.
    """
    best = list[str]()
    for default_route, theirs, own in endpoints:
        subnets = [ip_interface(each).network for each in own]
        found = [each for each in theirs if any(ip_address(each) in subnet for subnet in subnets)]
        if found and (default_route or not best):
            best = found
    return best
