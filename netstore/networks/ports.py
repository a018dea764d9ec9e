"""Published ports: which host port is whose, inside the store's transactions."""

from __future__ import annotations

import errno
import os
import socket
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from netstore.errors import AddressTaken, Exhausted, FailedPrecondition
from netstore.model import PortMapping, Protocol, Service
from netstore.store import Transaction

__all__ = [
    "claim", "claim_for_mesh", "claim_for_service", "ephemeral_range", "held_for_mesh", "matching", "release",
]  # fmt: skip

TCP_LISTEN = "0A"
_PROC_NET = {Protocol.TCP: ("tcp", "tcp6"), Protocol.UDP: ("udp", "udp6")}
_KINDS = {
    Protocol.TCP: (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    Protocol.UDP: (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    Protocol.SCTP: (socket.SOCK_STREAM, socket.IPPROTO_SCTP),
}


def ephemeral_range() -> tuple[int, int]:
    """Return the node's ephemeral ports, first and last (ip-sysctl: ip_local_port_range)."""
    first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return int(first), int(last)


def matching(ports: Iterable[PortMapping], asked: PortMapping) -> list[PortMapping]:
    """Return the published ports that a mapping means; its host port 0 and host address "" mean any."""
    return [
        port for port in ports
        if port.container_port == asked.container_port and port.protocol is asked.protocol
        and port.count == asked.count and asked.host_port in (0, port.host_port)
        and asked.host_ip in ("", port.host_ip)
    ]  # fmt: skip


def claim(
    tx: Transaction, endpoint_id: str, ports: Sequence[PortMapping], *, keeper: str = ""
) -> tuple[PortMapping, ...]:
    """Take host ports for an endpoint and return them; those of port 0, or of a choice, get a free one.

    Processes of the name `keeper` may listen on them: they keep them free for the caller, and serve nobody.

    Raises:
        AddressTaken: an endpoint, or a process of the host, has one.
        Exhausted: none that would do is free.
    """
    return tuple(_claim(tx, endpoint_id, port, keeper) for port in ports)


def claim_for_service(tx: Transaction, service: Service, *, strict: bool = True) -> list[str]:
    """Take the ports of the node that lead to a service, and give back those that do not any more.

    Returns:
        Without `strict`: who has those that could not be taken.

    Raises:
        AddressTaken: an endpoint, another service or a process of the host has one.
    """
    taken: list[str] = []
    rows = tx.rows("SELECT protocol, port FROM service_ports WHERE service_id = ?", service.id)
    held, wanted = set(rows), {(each.protocol.value, each.published_port) for each in service.spec.ports}
    for protocol, number in held - wanted:
        tx.execute("DELETE FROM service_ports WHERE protocol = ? AND port = ?", protocol, number)
    for protocol, number in sorted(wanted - held):
        port = PortMapping(container_port=number, host_port=number, protocol=Protocol(protocol))
        if not (holder := _holder(tx, port) or _bound_on_host(port, number)):
            tx.execute("INSERT INTO service_ports VALUES (?, ?, ?)", protocol, number, service.id)
        elif strict:
            raise _taken(port, holder)
        else:
            taken.append(_taken(port, holder).what)
    return taken


def claim_for_mesh(tx: Transaction, endpoint_id: str) -> list[str]:
    """Take the ports of the node that lead to an endpoint of another node, and that nobody else has.

    Returns:
        Who has those that could not be taken.
    """
    taken: list[str] = []
    wanted = "SELECT protocol, port FROM mesh_ports WHERE endpoint_id = ? AND NOT held"
    for protocol, number in tx.rows(wanted, endpoint_id):
        port = PortMapping(container_port=number, host_port=number, protocol=Protocol(protocol))
        if holder := _holder(tx, port) or _bound_on_host(port, number):
            taken.append(_taken(port, holder).what)
        else:
            taking = "UPDATE mesh_ports SET held = 1 WHERE endpoint_id = ? AND protocol = ? AND port = ?"
            tx.execute(taking, endpoint_id, protocol, number)
    return taken


def held_for_mesh(tx: Transaction, endpoint_id: str, ports: Sequence[PortMapping]) -> tuple[PortMapping, ...]:
    """Return those of another node's endpoint's ports that this node publishes."""
    held = tx.rows("SELECT protocol, port FROM mesh_ports WHERE endpoint_id = ? AND held", endpoint_id) if ports else ()
    return tuple(port for port in ports if (port.protocol, port.host_port) in held)


def release(tx: Transaction, endpoint_id: str, ports: Iterable[PortMapping] | None = None) -> None:
    """Give back an endpoint's ports: these, or all."""
    if ports is None:
        tx.execute("DELETE FROM ports WHERE endpoint_id = ?", endpoint_id)
        return
    for port in ports:
        tx.execute(
            "DELETE FROM ports WHERE endpoint_id = ? AND protocol = ? AND host_port = ? AND host_ip = ?",
            endpoint_id, port.protocol.value, port.host_port, port.host_ip,
        )  # fmt: skip


def _claim(tx: Transaction, endpoint_id: str, port: PortMapping, keeper: str) -> PortMapping:
    if port.host_port and not port.host_port_last:
        holder = _insert(tx, endpoint_id, port, keeper)
        if holder:
            raise _taken(port, holder)
        return port
    low, high = (port.host_port, port.host_port_last) if port.host_port else ephemeral_range()
    highest = tx.row(
        "SELECT last_port FROM ports WHERE protocol = ? AND host_port BETWEEN ? AND ? ORDER BY host_port DESC LIMIT 1",
        port.protocol.value, low, high,
    )  # fmt: skip
    top = high - port.count + 1
    start = highest[0] + 1 if highest and highest[0] < top else low
    for number in (*range(start, top + 1), *range(low, min(start, top + 1))):
        candidate = replace(port, host_port=number, host_port_last=0)
        if not _insert(tx, endpoint_id, candidate, keeper):
            return candidate
    raise Exhausted(f"no {port.protocol} port from {low} to {high} is free", hint="unpublish some, or name the port")


def _taken(port: PortMapping, holder: str) -> AddressTaken:
    last = f"-{port.host_port + port.count - 1}" if port.count > 1 else ""
    return AddressTaken(
        f"host port {_shown(port)}:{port.host_port}{last}/{port.protocol} is taken by {holder}",
        hint="publish on another port, or on port 0 to take a free one", reason="PORT_TAKEN", holder=holder,
    )  # fmt: skip


def _shown(port: PortMapping) -> str:
    return f"[{port.host_ip}]" if ":" in port.host_ip else port.host_ip or "0.0.0.0"


def _insert(tx: Transaction, endpoint_id: str, port: PortMapping, keeper: str) -> str:
    """Take a port or a range; returns "" on success, else who has it, or a part of it."""
    last = port.host_port + port.count - 1
    try:
        tx.execute(
            "INSERT INTO ports VALUES (?, ?, ?, ?, ?, ?)",
            port.host_ip, port.protocol.value, port.host_port, last, port.container_port, endpoint_id,
        )  # fmt: skip
    except sqlite3.IntegrityError:
        return _holder(tx, port) or "another endpoint"
    for number in range(port.host_port, last + 1):
        holder = _bound_on_host(port, number)
        if holder and not (keeper and f"({keeper})" in holder):
            release(tx, endpoint_id, [port])
            return holder
    return ""


def _holder(tx: Transaction, port: PortMapping) -> str:
    """Name who has a port, or a part of a range, in the store; "" when nobody has."""
    last = port.host_port + port.count - 1
    row = tx.row(
        "SELECT endpoints.name, ports.endpoint_id FROM ports LEFT JOIN endpoints ON endpoints.id = endpoint_id"
        " WHERE protocol = ? AND host_port <= ? AND last_port >= ? AND (host_ip = ? OR host_ip = '' OR ? = '')",
        port.protocol.value, last, port.host_port, port.host_ip, port.host_ip,
    )  # fmt: skip
    if row:
        return f"endpoint {row[0] or row[1][:12]}"
    row = tx.row(
        "SELECT name FROM service_ports JOIN services ON services.id = service_id"
        " WHERE protocol = ? AND port BETWEEN ? AND ?", port.protocol.value, port.host_port, last,
    )  # fmt: skip
    if row:
        return f"service {row[0]}"
    row = tx.row(
        "SELECT json_extract(remote_endpoints.body, '$.name'), endpoint_id FROM mesh_ports JOIN remote_endpoints"
        " ON id = endpoint_id WHERE held AND protocol = ? AND port BETWEEN ? AND ?",
        port.protocol.value, port.host_port, last,
    )  # fmt: skip
    return f"endpoint {row[0] or row[1][:12]} of another node" if row else ""


def _bound_on_host(port: PortMapping, number: int) -> str:
    """Return the process that listens on a port already, "" when none does: publishing would take its traffic away.

    Raises:
        FailedPrecondition: the host address is not the node's.
    """
    addresses = [port.host_ip] if port.host_ip else ["0.0.0.0", "::"]
    for address in addresses:
        code = _probe(port.protocol, address, number)
        if code == errno.EADDRNOTAVAIL and port.host_ip:
            raise FailedPrecondition(
                f"host address {port.host_ip} is not the node's", hint="publish on one of its addresses, or on none"
            )
        if code == errno.EADDRINUSE:
            return _listener(port.protocol, number)
    return ""


def _probe(protocol: Protocol, address: str, number: int) -> int:
    kind, transport = _KINDS[protocol]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, kind | socket.SOCK_CLOEXEC, transport) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if protocol is Protocol.TCP:  # closed connections that linger are no listener
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, number))
    except OSError as error:  # no IPv6, or no SCTP, on this host: nobody can listen there
        return error.errno or errno.EIO
    return 0


def _listener(protocol: Protocol, number: int) -> str:
    """Name the process that holds a port of this network namespace (proc_pid_net(5): tcp, udp and their inodes)."""
    inodes = set()
    for name in _PROC_NET.get(protocol, ()):
        for line in Path("/proc/thread-self/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            listens = protocol is not Protocol.TCP or fields[3] == TCP_LISTEN
            if listens and int(fields[1].rpartition(":")[2], 16) == number:
                inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(each) in inodes for each in (process / "fd").iterdir()):
                return f"process {process.name} ({(process / 'comm').read_text().strip()}) of the host"
        except OSError:  # it ended meanwhile, or hides its descriptors
            continue
    return "a process of the host"
