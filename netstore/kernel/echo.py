"""ICMP echo (RFC 792, 4443): whether an address answers, how fast, and to packets of which size."""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct
import time
from collections.abc import Sequence

__all__ = ["OVERHEAD", "echo"]

OVERHEAD = {4: 28, 6: 48}  # bytes of a packet that are headers
_HEADER = struct.Struct("!HHHH")  # type and code, checksum, identifier, sequence number
_REQUEST, _REPLY = {4: 0x0800, 6: 0x8000}, {4: 0x0000, 6: 0x8100}
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, IPV6_DONTFRAG = 10, 23, 62
PMTUDISC_PROBE = 3  # never fragment, and believe nobody who says that it would have to be


async def echo(address: str, sizes: Sequence[int], *, seconds: float) -> list[float | None]:
    """Send a packet of each size (bytes, IP header included) at once; must run in the namespace that it concerns.

    Returns:
        For each the seconds until its answer, None where none came in time, or the kernel did not send it.
    """
    version = 6 if ":" in address else 4
    identifier, loop = secrets.randbelow(1 << 16), asyncio.get_running_loop()
    times: list[float | None] = [None] * len(sizes)
    sent: dict[int, float] = {}
    with _socket(version) as link:
        link.connect((address, 0))
        for number, size in enumerate(sizes):
            try:
                link.send(_packet(version, identifier, number, size))
            except OSError:  # too big for the interface, or nobody knows the way
                continue
            sent[number] = time.perf_counter()
        try:
            async with asyncio.timeout(seconds):
                while sent:
                    answer = await loop.sock_recv(link, 1 << 16)
                    offset = 4 * (answer[0] & 15) if version == 4 else 0
                    kind, _, whose, number = _HEADER.unpack_from(answer, offset)
                    if kind == _REPLY[version] and whose == identifier and number in sent:
                        times[number] = time.perf_counter() - sent.pop(number)
        except (TimeoutError, OSError):
            pass
    return times


def _socket(version: int) -> socket.socket:
    if version == 4:
        link = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP)
        link.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_PROBE)
        return link
    link = socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMPV6)
    link.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_PROBE)
    link.setsockopt(socket.IPPROTO_IPV6, IPV6_DONTFRAG, 1)
    return link


def _packet(version: int, identifier: int, number: int, size: int) -> bytes:
    """Return a request; of IPv6 the kernel works out the checksum. The payload is zeros, which do not count in it."""
    total = _REQUEST[version] + identifier + number
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return _HEADER.pack(_REQUEST[version], checksum, identifier, number).ljust(size - OVERHEAD[version] + 8, b"\0")
