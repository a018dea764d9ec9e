"""Published ports: which host port is whose, inside the store's transactions."""

from __future__ import annotations

import errno
import socket
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from netstore.errors import AddressTaken, Exhausted, FailedPrecondition
from netstore.model import PortMapping, Protocol
from netstore.store import Transaction

__all__ = ["claim", "ephemeral_range", "release"]


def ephemeral_range() -> tuple[int, int]:
    """Return the node's ephemeral ports, first and last (ip-sysctl: ip_local_port_range)."""
    first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return int(first), int(last)


def claim(tx: Transaction, endpoint_id: str, ports: Sequence[PortMapping]) -> tuple[PortMapping, ...]:
    """Take host ports for an endpoint and return them; those of port 0 get a free one.

    Raises:
        AddressTaken: an endpoint, or a process of the host, has one.
        Exhausted: no ephemeral port is free.
    """
    return tuple(_claim(tx, endpoint_id, port) for port in ports)


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


def _claim(tx: Transaction, endpoint_id: str, port: PortMapping) -> PortMapping:
    if port.host_port:
        holder = _insert(tx, endpoint_id, port)
        if holder:
            raise AddressTaken(
                f"host port {port.host_ip or '0.0.0.0'}:{port.host_port}/{port.protocol} is taken by {holder}",
                hint="publish on another port, or on port 0 to take a free one", reason="PORT_TAKEN", holder=holder,
            )  # fmt: skip
        return port
    first, last = ephemeral_range()
    row = tx.row(
        "SELECT max(host_port) FROM ports WHERE protocol = ? AND host_port BETWEEN ? AND ?",
        port.protocol.value, first, last,
    )  # fmt: skip
    start = row[0] + 1 if row and row[0] and row[0] < last else first
    for number in (*range(start, last + 1), *range(first, start)):
        candidate = replace(port, host_port=number)
        if not _insert(tx, endpoint_id, candidate):
            return candidate
    raise Exhausted(f"no {port.protocol} port from {first} to {last} is free", hint="unpublish some, or name the port")


def _insert(tx: Transaction, endpoint_id: str, port: PortMapping) -> str:
    """Take a port; returns "" on success, else who has it."""
    try:
        tx.execute(
            "INSERT INTO ports VALUES (?, ?, ?, ?, ?)",
            port.host_ip, port.protocol.value, port.host_port, port.container_port, endpoint_id,
        )  # fmt: skip
    except sqlite3.IntegrityError:
        row = tx.row(
            "SELECT endpoints.name, endpoints.id FROM ports JOIN endpoints ON endpoints.id = endpoint_id"
            " WHERE protocol = ? AND host_port = ? AND (host_ip = ? OR host_ip = '' OR ? = '')",
            port.protocol.value, port.host_port, port.host_ip, port.host_ip,
        )  # fmt: skip
        return f"endpoint {row[0] or row[1][:12]}" if row else "another endpoint"
    if _bound_on_host(port):
        release(tx, endpoint_id, [port])
        return "a process of the host"
    return ""


def _bound_on_host(port: PortMapping) -> bool:
    """Say whether a process listens there already: publishing would take its traffic away."""
    kind = socket.SOCK_STREAM if port.protocol is Protocol.TCP else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC) as probe:
        if port.protocol is Protocol.TCP:  # closed connections that linger are no listener
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((port.host_ip or "0.0.0.0", port.host_port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise FailedPrecondition(
                    f"host_ip: {port.host_ip} is no address of this node", hint="publish on one that `ip address` shows"
                ) from error
            return True
    return False
