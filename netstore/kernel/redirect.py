"""The redirect of 127.0.0.11:53 in a sandbox, written as nfnetlink messages (linux/netfilter/nf_tables.h).

Ports are rewritten, both ways, and no NAT is asked for: it would have conntrack look at every packet of the sandbox
[6 to 8 % of the bytes that an overlay carries]. Where a container has conntrack of its own, it sees one port alone:
questions are rewritten before it, answers after it.

It is made at every attach, is always the same but for two port numbers, and libnftables would take longer for it
[0.4 ms, a context each time] than the kernel does for the whole attach; so the messages are encoded once, here. What
they mean is read back with `nft list table ip netstore` in the tests. Kernel constants keep their C names.
"""

from __future__ import annotations

import errno
import functools
import socket
import struct

from netstore.errors import KernelError
from netstore.kernel.attributes import NETLINK_NETFILTER, attribute, be32, message, messages, nested, text, transact
from netstore.kernel.namespaces import socket_inside

__all__ = ["has_redirect", "redirect", "remove_redirect"]

TABLE, CHAIN, ANSWERS, PORT = b"netstore", b"output", b"answers", 53

NFNL_SUBSYS_NFTABLES = 10
NFT_MSG_NEWTABLE, NFT_MSG_DELTABLE, NFT_MSG_NEWCHAIN, NFT_MSG_GETCHAIN, NFT_MSG_NEWRULE = 0, 2, 3, 4, 6
NLMSG_ERROR = 2
NLM_F_REQUEST, NLM_F_ACK, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x1, 0x4, 0x200, 0x400, 0x800
NFTA_TABLE_NAME = 1
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_POLICY, NFTA_CHAIN_TYPE = 1, 3, 4, 5, 7
NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY = 1, 2
NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS = 1, 2, 4
NFTA_LIST_ELEM, NFTA_EXPR_NAME, NFTA_EXPR_DATA, NFTA_DATA_VALUE = 1, 1, 2, 1
NFTA_PAYLOAD_DREG, NFTA_PAYLOAD_BASE, NFTA_PAYLOAD_OFFSET, NFTA_PAYLOAD_LEN = 1, 2, 3, 4
NFTA_CMP_SREG, NFTA_CMP_OP, NFTA_CMP_DATA = 1, 2, 3
NFTA_META_DREG, NFTA_META_KEY = 1, 2
NFTA_IMMEDIATE_DREG, NFTA_IMMEDIATE_DATA = 1, 2
NFTA_PAYLOAD_SREG, NFTA_PAYLOAD_CSUM_TYPE, NFTA_PAYLOAD_CSUM_OFFSET = 5, 6, 7
NF_INET_LOCAL_OUT, NF_ACCEPT, NFT_CMP_EQ = 3, 1, 0
NF_IP_PRI_RAW, NF_IP_PRI_NAT_DST = -300, -100  # conntrack's is -200
NFT_REG_1, NFT_META_L4PROTO = 1, 16
NFT_PAYLOAD_NETWORK_HEADER, NFT_PAYLOAD_TRANSPORT_HEADER, NFT_PAYLOAD_CSUM_INET = 1, 2, 1

# Where header fields are, in bytes: addresses in IPv4's (RFC 791), ports in both transports', and their checksums.
_SOURCE, _DESTINATION = (12, 0), (16, 2)
_CHECKSUMS = {socket.IPPROTO_UDP: 6, socket.IPPROTO_TCP: 16}
_PLACES = {socket.IPPROTO_UDP: b"\xf1\xf2", socket.IPPROTO_TCP: b"\xf3\xf4"}  # of the ports in the encoded messages


def redirect(namespace: int, address: str, udp: int, tcp: int) -> None:
    """Send what a sandbox asks of `address`, port 53, to these ports of it instead; one that is there is replaced.

    Raises:
        KernelError: the kernel refused; nothing is left.
    """
    messages = [each.replace(b"\xf1\xf2", struct.pack("!H", udp)).replace(b"\xf3\xf4", struct.pack("!H", tcp))
                for each in _messages(socket.inet_aton(address))]  # fmt: skip
    code = _batch(namespace, messages)
    if code == errno.EEXIST:  # replacing waits for a grace period [8-16 ms], so only then
        code = _batch(namespace, [_table(NFT_MSG_DELTABLE, 0), *messages])
    if code:
        raise KernelError(code, "redirecting names in", "a sandbox")


def has_redirect(namespace: int) -> bool:
    """Say whether the redirect is there still: whoever may set up a firewall inside may flush it."""
    question = message(
        NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETCHAIN, NLM_F_REQUEST,
        text(NFTA_CHAIN_TABLE, TABLE) + text(NFTA_CHAIN_NAME, CHAIN), family=socket.AF_INET,
    )  # fmt: skip
    with socket_inside(namespace, socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as connection:
        connection.send(question)
        kinds = [kind for kind, _ in messages(connection.recv(65536, socket.MSG_DONTWAIT))]
    return NLMSG_ERROR not in kinds


def remove_redirect(namespace: int) -> None:
    """Take the redirect away; one that is gone is a success."""
    code = _batch(namespace, [_table(NFT_MSG_DELTABLE, 0)])
    if code not in (0, errno.ENOENT):
        raise KernelError(code, "removing the redirect of names from", "a sandbox")


def _batch(namespace: int, messages: list[bytes]) -> int:
    with socket_inside(namespace, socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as connection:
        return transact(connection, messages)


@functools.cache
def _messages(address: bytes) -> tuple[bytes, ...]:
    port = struct.pack("!H", PORT)
    rules = [_rule(CHAIN, _DESTINATION, address, protocol, port, place) for protocol, place in _PLACES.items()]
    rules += [_rule(ANSWERS, _SOURCE, address, protocol, place, port) for protocol, place in _PLACES.items()]
    return (
        _table(NFT_MSG_NEWTABLE, NLM_F_CREATE | NLM_F_EXCL),
        _chain(CHAIN, NF_IP_PRI_RAW),
        _chain(ANSWERS, NF_IP_PRI_NAT_DST),
        *rules,
    )


def _chain(name: bytes, priority: int) -> bytes:
    hook = be32(NFTA_HOOK_HOOKNUM, NF_INET_LOCAL_OUT) + be32(NFTA_HOOK_PRIORITY, priority)
    body = text(NFTA_CHAIN_TABLE, TABLE) + text(NFTA_CHAIN_NAME, name) + nested(NFTA_CHAIN_HOOK, hook)
    body += be32(NFTA_CHAIN_POLICY, NF_ACCEPT) + text(NFTA_CHAIN_TYPE, b"filter")
    return _nft(NFT_MSG_NEWCHAIN, NLM_F_CREATE, body)


def _rule(chain: bytes, end: tuple[int, int], address: bytes, protocol: int, port: bytes, other: bytes) -> bytes:
    """Return, with _DESTINATION as `end`: `ip daddr ADDRESS PROTOCOL dport PORT PROTOCOL dport set OTHER`."""
    address_at, port_at = end
    expressions = (
        _load(NFT_PAYLOAD_NETWORK_HEADER, offset=address_at, length=4),
        _equals(address),
        _expression(b"meta", be32(NFTA_META_KEY, NFT_META_L4PROTO) + be32(NFTA_META_DREG, NFT_REG_1)),
        _equals(bytes([protocol])),
        _load(NFT_PAYLOAD_TRANSPORT_HEADER, offset=port_at, length=2),
        _equals(port),
        _immediate(other),
        _expression(
            b"payload",
            be32(NFTA_PAYLOAD_SREG, NFT_REG_1) + _place(NFT_PAYLOAD_TRANSPORT_HEADER, port_at, 2)
            + be32(NFTA_PAYLOAD_CSUM_TYPE, NFT_PAYLOAD_CSUM_INET)
            + be32(NFTA_PAYLOAD_CSUM_OFFSET, _CHECKSUMS[protocol]),
        ),
    )  # fmt: skip
    body = text(NFTA_RULE_TABLE, TABLE) + text(NFTA_RULE_CHAIN, chain)
    body += nested(NFTA_RULE_EXPRESSIONS, b"".join(expressions))
    return _nft(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, body)


def _load(base: int, *, offset: int, length: int) -> bytes:
    return _expression(b"payload", be32(NFTA_PAYLOAD_DREG, NFT_REG_1) + _place(base, offset, length))


def _place(base: int, offset: int, length: int) -> bytes:
    where = be32(NFTA_PAYLOAD_BASE, base) + be32(NFTA_PAYLOAD_OFFSET, offset)
    return where + be32(NFTA_PAYLOAD_LEN, length)


def _equals(value: bytes) -> bytes:
    data = nested(NFTA_CMP_DATA, attribute(NFTA_DATA_VALUE, value))
    return _expression(b"cmp", be32(NFTA_CMP_SREG, NFT_REG_1) + be32(NFTA_CMP_OP, NFT_CMP_EQ) + data)


def _immediate(value: bytes) -> bytes:
    data = nested(NFTA_IMMEDIATE_DATA, attribute(NFTA_DATA_VALUE, value))
    return _expression(b"immediate", be32(NFTA_IMMEDIATE_DREG, NFT_REG_1) + data)


def _expression(name: bytes, data: bytes) -> bytes:
    return nested(NFTA_LIST_ELEM, text(NFTA_EXPR_NAME, name) + nested(NFTA_EXPR_DATA, data))


def _table(kind: int, flags: int) -> bytes:
    return _nft(kind, flags, text(NFTA_TABLE_NAME, TABLE))


def _nft(kind: int, flags: int, body: bytes) -> bytes:
    return message(NFNL_SUBSYS_NFTABLES << 8 | kind, NLM_F_REQUEST | NLM_F_ACK | flags, body, family=socket.AF_INET)
