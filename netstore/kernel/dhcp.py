"""A DHCP client (RFC 2131) for an interface inside a namespace; pyroute2 writes and reads the packets.

A socket is open only while something is asked: who holds a lease costs nothing until it is to be renewed.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from types import SimpleNamespace
from typing import Any

from netstore import clock
from netstore.errors import FailedPrecondition, Unavailable
from netstore.kernel.namespaces import socket_inside
from netstore.model import Lease

__all__ = ["ANSWER_SECONDS", "Interface", "Refused", "acquire", "release", "renew"]

ANSWER_SECONDS = 12.0
"""How long a server may take: dnsmasq looks for three seconds whether anybody has the address."""

SO_ATTACH_FILTER = 26
ETH_P_IP = 0x0800
_PAUSES = (1.0, 2.0, 4.0, 8.0)  # RFC 2131 section 4.1 begins with four seconds, for networks of its time

_Accept = Callable[[Any], bool]

_HINT = "see that a DHCP server is on the parent's link, then try again"
_NO_SERVER = "NO_DHCP_SERVER"


class Refused(FailedPrecondition):
    """The server does not let the client have, or keep, an address."""

    reason = "LEASE_REFUSED"


@dataclass(frozen=True, slots=True)
class Interface:
    """Who asks: an interface that is up, by name, in a namespace (descriptor); its host's name, an identifier.

    Without an identifier its MAC is it; interfaces that share one MAC need one each.
    """

    namespace: int
    name: str
    hostname: str = ""
    identifier: bytes = b""


async def acquire(interface: Interface, *, wanted: str = "") -> Lease:
    """Get a lease, of the `wanted` address where there is one.

    Raises:
        Unavailable: no server answered.
        Refused: those that answered offered another address, or took the offer back.
    """
    with await _conversation(interface) as talk:
        discover = talk.messages.discover(talk.parameters)
        if wanted:
            discover.dhcp["options"]["requested_ip"] = wanted
        others: list[str] = []

        def is_offer(answer: Any) -> bool:
            if answer.message_type.name != "OFFER" or not answer.dhcp["options"].get("server_id"):
                return False
            if wanted and answer.dhcp["yiaddr"] != wanted:
                others.append(f"{answer.dhcp['options']['server_id']} offers {answer.dhcp['yiaddr']}")
                return False
            return True

        offer = await talk.ask(discover, is_offer, declined=others)
        if offer is None and others:
            raise Refused(f"address {wanted}: DHCP server {others[0]} instead", hint="ask for that one, or for none")
        if offer is None:
            raise Unavailable(f"no DHCP server answered within {ANSWER_SECONDS:.0f} s", hint=_HINT, reason=_NO_SERVER)
        answer = await talk.ask(talk.messages.request_for_offer(talk.parameters, offer), _is_verdict)
        if answer is None:
            raise Unavailable("the DHCP server answered once and no more", hint=_HINT, reason=_NO_SERVER)
        return _granted(answer)


async def renew(interface: Interface, lease: Lease, *, rebind: bool) -> Lease | None:
    """Make a lease last longer, at its own server or, with `rebind`, at any; None when nobody answers.

    Raises:
        Refused: it is to be given up.
    """
    with await _conversation(interface) as talk:
        state = talk.states.REBINDING if rebind else talk.states.RENEWING
        answer = await talk.ask(talk.messages.request_for_lease(talk.parameters, _held(lease), state), _is_verdict)
        return _granted(answer) if answer else None


async def release(interface: Interface, lease: Lease) -> None:
    """Give a lease back. Nobody answers that."""
    with await _conversation(interface) as talk:
        await talk.send(talk.messages.release(_held(lease)))


def _held(lease: Lease) -> SimpleNamespace:
    """Return a lease as pyroute2's messages know it."""
    return SimpleNamespace(ip=lease.address, server_id=lease.server, server_mac=lease.server_mac_address)


class _Conversation:
    """Questions and answers of one transaction."""

    def __init__(self, pyroute2: Any, link: Any, interface: Interface) -> None:
        self.messages, self.states = pyroute2.messages, pyroute2.fsm.State
        option = pyroute2.enums.dhcp.Option
        self.parameters = [option.SUBNET_MASK, option.ROUTER, option.NAME_SERVER, option.LEASE_TIME,
                           option.RENEWAL_TIME, option.REBINDING_TIME]  # fmt: skip
        self._link = link
        self._interface = interface
        self._number = random.SystemRandom().randrange(1, 1 << 32)
        self._began = time.monotonic()

    async def send(self, message: Any) -> None:
        identifier, mac = self._interface.identifier, self._link.l2addr
        options = message.dhcp["options"]
        options["client_id"] = {"type": 0, "key": identifier} if identifier else {"type": 1, "key": mac}
        if self._interface.hostname and message.message_type.name != "RELEASE":
            options["host_name"] = self._interface.hostname
        message.dhcp["xid"] = self._number
        message.dhcp["secs"] = min(int(time.monotonic() - self._began), 0xFFFF)
        await self._link.put(message)

    async def ask(self, message: Any, accept: _Accept, *, declined: Sequence[str] = ()) -> Any:
        """Send a message, again and again, until an answer to it is accepted; None when none comes in time.

        Once something was declined others have only until the next repetition.
        """
        deadline = time.monotonic() + ANSWER_SECONDS
        for pause in _PAUSES:
            if declined:
                break
            await self.send(message)
            until = min(deadline, time.monotonic() + pause * random.uniform(0.9, 1.1))
            while (left := until - time.monotonic()) > 0:
                try:
                    answer = await asyncio.wait_for(self._link.get(), left)
                    if answer.dhcp["xid"] == self._number and answer.dhcp["op"] == 2 and accept(answer):
                        return answer
                except TimeoutError:
                    break
                except (ValueError, LookupError, TypeError, AttributeError, struct.error):
                    continue  # whoever is on the network may send anything
        return None


def _is_verdict(answer: Any) -> bool:
    return answer.message_type.name in ("ACK", "NAK")


def _granted(answer: Any) -> Lease:
    """Return the lease of an answer, whose parts anybody on the network may have made up.

    Raises:
        Refused: it is none.
    """
    options = answer.dhcp["options"]
    if answer.message_type.name == "NAK":
        raise Refused(f"DHCP server {options.get('server_id')} refused", hint=f"it says: {options.get('message', '-')}")
    try:
        address = IPv4Interface(f"{answer.dhcp['yiaddr']}/{options['subnet_mask']}")
        routers = [IPv4Address(each) for each in options.get("router", ())]
        servers = tuple(str(IPv4Address(each)) for each in options.get("name_server", ())[:3])
        seconds = int(options["lease_time"])
        renewing = float(options.get("renewal_time", seconds * 0.5))
        rebinding = float(options.get("rebinding_time", seconds * 0.875))
        if address.ip.is_multicast or address.ip.is_loopback or address.ip.is_unspecified or not seconds:
            raise ValueError(f"address {address} for {seconds} s")
        server = str(IPv4Address(options["server_id"]))
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(f"the DHCP server's answer makes no sense: {error}", hint="see its configuration") from error
    return Lease(
        address=str(address.ip), prefix=address.network.prefixlen, obtained=time.time(), boot=clock.boot_id(),
        uptime=clock.uptime(), seconds=seconds,
        renew_seconds=renewing, rebind_seconds=max(rebinding, renewing),
        router=next((str(each) for each in routers if each in address.network), ""), dns_servers=servers,
        server=server, server_mac_address=answer.eth_src,
    )  # fmt: skip


async def _conversation(interface: Interface) -> Any:
    """Open a socket that hears DHCP's answers alone, as a context."""
    pyroute2 = await asyncio.to_thread(_library)  # it takes most of a second the first time
    return _opened(pyroute2, interface)


def _library() -> Any:
    import pyroute2.dhcp.dhcp4socket
    import pyroute2.dhcp.fsm
    import pyroute2.dhcp.messages

    return pyroute2.dhcp


@contextmanager
def _opened(pyroute2: Any, interface: Interface) -> Iterator[_Conversation]:
    from pyroute2.ext import bpf

    link = pyroute2.dhcp4socket.AsyncDHCP4Socket(interface.name)  # opened by us: it would do so in this namespace
    raw = socket_inside(interface.namespace, socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
    socket.socket.__init__(link, socket.AF_PACKET, socket.SOCK_RAW, 0, raw.detach())
    with link:
        program, link.fprog = bpf.compile(link.bpf)
        link.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
        link.bind((interface.name, ETH_P_IP))
        link.l2addr = link.getsockname()[4].hex(":")
        yield _Conversation(pyroute2, link, interface)
