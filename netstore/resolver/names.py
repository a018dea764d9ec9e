"""What netstore-resolver knows: names and addresses of the store, read-only, as one sandbox sees them."""

from __future__ import annotations

import json
import socket
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

from netstore.networks.balance import backends, decode_service
from netstore.networks.vantage import host_addresses
from netstore.resolver.upstream import split_server

__all__ = ["PODMAN_DOMAIN", "Names", "Service", "View"]

PODMAN_DOMAIN = ".dns.podman"
"""The search domain that podman gives its containers: names are the same with it, and nobody else is asked."""

_HOST_NAMES = ("host.docker.internal", "host.netstore.internal")
_TASKS = "tasks."
_PROTOCOLS = ("tcp", "udp", "sctp")
_SERVICE_LABEL = "netstore.service."
_REMOTE_BY_ADDRESS = (
    "SELECT remote_endpoints.body FROM remote_addresses JOIN remote_endpoints ON remote_endpoints.id = endpoint_id"
    " JOIN nodes ON nodes.id = node_id WHERE remote_addresses.network_id = ? AND address = ? AND up"
)


_Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class View:
    """What one sandbox sees: its user-defined networks (id -> name), the host, whether it may ask outside."""

    networks: Mapping[str, str]
    host: tuple[str, ...]
    forwards: bool
    servers: tuple[str, ...] = ()
    """Name servers to ask instead of the host's; "DOMAIN=ADDRESS" for what is below a domain alone."""
    subnets: tuple[str, ...] = ()
    """Of all its networks, the predefined one too."""
    links: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    """Names of its own for others: alias -> (network id, the other's name)."""

    def servers_for(self, name: str) -> list[str]:
        """Return the servers for a lower-case name: those of the closest domain, else those of no domain."""
        best, found = -1, list[str]()
        for entry in self.servers:
            domain, _, server = entry.rpartition("=")
            domain = domain.lower()
            if domain and name != domain and not name.endswith(f".{domain}"):
                continue
            if len(domain) > best:
                best, found = len(domain), []
            if len(domain) == best:
                found.append(server)
        return found

    def holds(self, address: IPv4Address | IPv6Address) -> bool:
        """Say whether an address is one of its networks'."""
        return any(address in ip_network(subnet) for subnet in self.subnets)


@dataclass(frozen=True, slots=True)
class Service:
    """Where a service is: the port, the name of who has it, and its addresses."""

    port: int
    target: str
    addresses: tuple[str, ...]


class Names:
    """Reads the database; `version` changes whenever somebody committed to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None

    def _database(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, isolation_level=None)
            self._connection.execute("PRAGMA busy_timeout = 200")
        return self._connection

    def _rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        return self._database().execute(sql, values).fetchall()

    def open(self) -> bool:
        """Open the database anew where it is there; False when it is not yet."""
        self.close()
        try:
            self._rows("SELECT 1 FROM names, remote_names LIMIT 1")
        except sqlite3.Error:
            self.close()
            return False
        return True

    def close(self) -> None:
        """Let go of the database; it is opened again when it is needed."""
        if self._connection:
            self._connection.close()
        self._connection = None

    def version(self) -> int:
        """Return SQLite's data_version, which another's commit changes; -1 when the database cannot be read."""
        try:
            return int(self._database().execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error:
            self.close()
            return -1

    def view(self, sandbox_id: str) -> View:
        """Return what a sandbox sees."""
        rows = self._rows(
            "SELECT networks.body, endpoints.body FROM endpoints JOIN networks ON networks.id = network_id"
            " WHERE sandbox_id = ?",
            sandbox_id,
        )
        pairs = [(json.loads(network), json.loads(endpoint)) for network, endpoint in rows]
        pairs = [(network, endpoint) for network, endpoint in pairs if endpoint["attached"]]
        forwards = any(not network["spec"]["internal"] for network, _ in pairs)
        subnets = tuple(pool["subnet"] for network, _ in pairs for pool in network["pools"] if pool["subnet"])
        servers = self._servers(sandbox_id, pairs)
        links: dict[str, list[tuple[str, str]]] = {}
        for network, endpoint in pairs:
            for link in endpoint["spec"].get("links", ()):
                target, _, alias = link.lower().partition(":")
                links.setdefault(alias, []).append((network["id"], target))
        return View(
            networks={network["id"]: network["name"] for network, _ in pairs if not network["predefined"]},
            host=_host(pairs),
            forwards=forwards,
            servers=servers if forwards else tuple(each for each in servers if _is_inside(each, subnets)),
            subnets=subnets,
            links=links,
        )

    def _servers(
        self, sandbox_id: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
    ) -> tuple[str, ...]:
        """Return a sandbox's own name servers, else its networks', else its leases'; the networks' domains always."""
        rows = self._rows("SELECT body FROM sandboxes WHERE id = ?", sandbox_id)
        own = tuple(server for (body,) in rows for server in json.loads(body).get("dns_servers", ()))
        shared = tuple(dict.fromkeys(server for network, _ in pairs for server in network["spec"]["dns_servers"]))
        domains = tuple(entry for entry in shared if "=" in entry)
        leased = tuple(server for _, each in pairs for server in (each.get("lease") or {}).get("dns_servers", ()))
        return (*own, *domains) if own else shared if shared != domains else (*dict.fromkeys(leased), *domains)

    def addresses(self, view: View, name: str) -> list[str] | None:
        """Return the addresses of a lower-case name on the networks of a view, None when nobody has it."""
        if name in _HOST_NAMES:
            return list(view.host)
        balanced = self._balanced(view, name)
        if balanced is not None:
            return balanced
        holders = self._holders(view, name)
        return [address for _, endpoint in holders for address in _addresses(endpoint)] if holders else None

    def _balanced(self, view: View, name: str) -> list[str] | None:
        """Return what a service's name means: its virtual addresses, or its endpoints'; None for another name."""
        wanted = name.removeprefix(_TASKS)
        for network_id, network in view.networks.items():
            short = wanted.removesuffix(f".{network.lower()}")
            query = "SELECT body FROM services WHERE network_id = ? AND lower(name) IN (?, ?)"
            for (body,) in self._rows(query, network_id, wanted, short):
                service = decode_service(body)
                if service.addresses and wanted == name:
                    return list(service.addresses)
                found = backends(self._rows, service)
                return [address for backend in found if backend.healthy for address in backend.addresses]
        return None

    def _holders(self, view: View, name: str) -> list[tuple[str, dict[str, Any]]]:
        """Return the endpoints of a name, each with the name of its network.

        A link of the sandbox's own comes first; `<name>.<network>` means that network alone, as Docker has it.
        """
        name = name.removesuffix(PODMAN_DOMAIN)
        linked = [each for network, target in view.links.get(name, ()) for each in self._on(view, [network], target)]
        found = linked or self._on(view, list(view.networks), name)
        for network_id, network in view.networks.items():
            suffix = f".{network.lower()}"
            if not found and name.endswith(suffix):
                found = self._on(view, [network_id], name.removesuffix(suffix))
        return found

    def _on(self, view: View, networks: Sequence[str], name: str) -> list[tuple[str, dict[str, Any]]]:
        marks = ", ".join("?" * len(networks))
        rows = self._rows(
            f"SELECT names.network_id, body FROM endpoints JOIN names ON names.endpoint_id = endpoints.id"
            f" WHERE names.network_id IN ({marks}) AND names.name = ?",
            *networks, name,
        )  # fmt: skip
        rows += self._rows(
            f"SELECT remote_names.network_id, remote_endpoints.body FROM remote_names"
            f" JOIN remote_endpoints ON remote_endpoints.id = endpoint_id JOIN nodes ON nodes.id = node_id"
            f" WHERE remote_names.network_id IN ({marks}) AND remote_names.name = ? AND up",
            *networks, name,
        )  # fmt: skip
        found = [(view.networks.get(network_id, ""), json.loads(body)) for network_id, body in rows]
        return [(network, endpoint) for network, endpoint in found if endpoint["attached"]]

    def services(self, view: View, service: str, protocol: str, name: str) -> list[Service] | None:
        """Return where `_service._protocol.name` is (RFC 2782), None when nobody has the name.

        A service is a port that is exposed or published, by its number or by its name in services(5), or one that a
        label `netstore.service.NAME=PORT[/PROTOCOL]` of the container or endpoint names.
        """
        holders = self._holders(view, name)
        if not holders:
            return None
        return [
            Service(port, target, tuple(_addresses(endpoint)))
            for network, endpoint in holders
            if (target := _full_name(endpoint["name"] or name, network)) and protocol in _PROTOCOLS
            if (port := self._port(endpoint, service, protocol))
        ]

    def _port(self, endpoint: Mapping[str, Any], service: str, protocol: str) -> int:
        """Return the port of a service of an endpoint, 0 when it has none."""
        query = (
            "SELECT containers.body, images.body FROM sandboxes JOIN containers ON containers.id = container_id"
            " JOIN images ON images.id = image_id WHERE sandboxes.id = ?"
        )
        labels, exposed = dict(endpoint.get("labels", {})), list[str]()
        for texts in self._rows(query, endpoint.get("sandbox_id", "")):
            container, image = map(json.loads, texts)
            labels |= container["labels"]
            exposed += [*container["spec"].get("exposed_ports", ()), *image["config"].get("exposed_ports", ())]
        number, _, declared = labels.get(f"{_SERVICE_LABEL}{service}", "").partition("/")
        if number.isdecimal() and 0 < int(number) < 65536 and (declared or "tcp") == protocol:
            return int(number)
        port = _known_port(service, protocol)
        ranges = [(each["container_port"], each["count"], each["protocol"]) for each in endpoint.get("ports", ())]
        published = any(first <= port < first + count and of == protocol for first, count, of in ranges)
        return port if port and (published or _exposes(exposed, port, protocol)) else 0

    def name_of(self, view: View, packed: bytes) -> str:
        """Return `<name>.<network>` of an address on the networks of a view, "" when nobody has it."""
        query = (
            "SELECT body, (SELECT min(name) FROM names WHERE names.endpoint_id = endpoints.id)"
            " FROM addresses JOIN endpoints ON endpoints.id = addresses.endpoint_id"
            " WHERE addresses.network_id = ? AND address = ?"
        )
        for network_id, network in view.networks.items():
            for body, name in self._rows(query, network_id, packed):
                endpoint = json.loads(body)
                if endpoint["attached"]:
                    return _full_name(endpoint["name"] or name or "", network)
            for (body,) in self._rows(_REMOTE_BY_ADDRESS, network_id, packed):
                if name := json.loads(body)["name"]:
                    return _full_name(name, network)
        return ""


def _addresses(endpoint: Mapping[str, Any]) -> list[str]:
    """Return the addresses of an endpoint; those of another node's are written without their prefix length."""
    return [each if isinstance(each, str) else each["address"] for each in endpoint["addresses"]]


def _host(pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> tuple[str, ...]:
    return tuple(
        host_addresses(
            (endpoint["default_route"], _reached(network),
             [f"{each['address']}/{each['prefix']}" for each in endpoint["addresses"]])
            for network, endpoint in pairs
        )
    )  # fmt: skip


def _reached(network: Mapping[str, Any]) -> Sequence[str]:
    return network.get("host_seen_at") or [each["address"] for each in network.get("host_addresses", ())]


def _is_inside(entry: str, subnets: Sequence[str]) -> bool:
    """Say whether a name server is on one of these subnets: one that who has no way out may ask too."""
    address = ip_address(split_server(entry.rpartition("=")[2])[0])
    return any(address in ip_network(subnet) for subnet in subnets)


def _full_name(name: str, network: str) -> str:
    """Return `name.network`, "" where that is no name on the wire (a label of at most 63 bytes, 253 in all)."""
    full = f"{name}.{network}" if network else name
    return full if len(full) <= 253 and all(0 < len(label) <= 63 for label in full.split(".")) else ""


def _known_port(service: str, protocol: str) -> int:
    if service.isdecimal():
        return int(service) if int(service) < 65536 else 0
    try:
        return socket.getservbyname(service, protocol)
    except (OSError, UnicodeEncodeError, ValueError):
        return 0


def _exposes(texts: Sequence[str], port: int, protocol: str) -> bool:
    """Say whether one of EXPOSE's texts, `PORT[-PORT][/PROTOCOL]`, is about a port."""
    for text in texts:
        numbers, _, of = text.partition("/")
        first, _, last = numbers.partition("-")
        if (of or "tcp") == protocol and first.isdecimal() and int(first) <= port <= int(last or first):
            return True
    return False
