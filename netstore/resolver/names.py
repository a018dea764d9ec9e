"""What netstore-resolver knows: names and addresses of the store, read-only, as one sandbox sees them."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Names", "View"]

_HOST_NAMES = ("host.docker.internal", "host.netstore.internal")


@dataclass(frozen=True, slots=True)
class View:
    """What one sandbox sees: its user-defined networks (id -> name), the host, whether it may ask outside."""

    networks: dict[str, str]
    host: tuple[str, ...]
    forwards: bool
    servers: tuple[str, ...] = ()
    """Name servers to ask instead of the host's; "DOMAIN=ADDRESS" for what is below a domain alone."""

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

    def open(self) -> bool:
        """Open the database where it is there; False when it is not yet."""
        try:
            self._database().execute("SELECT 1 FROM names LIMIT 1")
        except sqlite3.Error:
            self._connection = None
            return False
        return True

    def version(self) -> int:
        """Return SQLite's data_version, which another's commit changes; -1 when the database cannot be read."""
        try:
            return int(self._database().execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error:
            self._connection = None
            return -1

    def view(self, sandbox_id: str) -> View:
        """Return what a sandbox sees."""
        rows = self._database().execute(
            "SELECT networks.body, endpoints.body FROM endpoints JOIN networks ON networks.id = network_id"
            " WHERE sandbox_id = ?",
            (sandbox_id,),
        )
        networks: dict[str, str] = {}
        host: tuple[str, ...] = ()
        forwards = False
        row = self._database().execute("SELECT body FROM sandboxes WHERE id = ?", (sandbox_id,)).fetchone()
        own = tuple(json.loads(row[0]).get("dns_servers", ())) if row else ()
        shared: tuple[str, ...] = ()
        for network_text, endpoint_text in rows:
            network, endpoint = json.loads(network_text), json.loads(endpoint_text)
            if not endpoint.get("attached"):
                continue
            forwards = forwards or not network["spec"].get("internal")
            shared += tuple(network["spec"].get("dns_servers", ()))
            gateways = tuple(each["gateway"] for each in endpoint.get("addresses", []) if each.get("gateway"))
            if gateways and (not host or endpoint.get("default_route")):
                host = gateways
            if not network.get("predefined"):
                networks[network["id"]] = network["name"]
        domains = tuple(entry for entry in shared if "=" in entry)
        return View(networks, host, forwards, (*own, *domains) if own else shared)

    def addresses(self, view: View, name: str) -> list[str] | None:
        """Return the addresses of a lower-case name on the networks of a view, None when nobody has it.

        `<name>.<network>` means that network alone, as Docker has it.
        """
        if name in _HOST_NAMES:
            return list(view.host)
        found = self._addresses(list(view.networks), name)
        for network_id, network in view.networks.items():
            suffix = f".{network.lower()}"
            if found is None and name.endswith(suffix):
                found = self._addresses([network_id], name.removesuffix(suffix))
        return found

    def _addresses(self, networks: list[str], name: str) -> list[str] | None:
        marks = ", ".join("?" * len(networks))
        rows = self._database().execute(
            f"SELECT body FROM endpoints JOIN names ON names.endpoint_id = endpoints.id"
            f" WHERE names.network_id IN ({marks}) AND names.name = ?",
            (*networks, name),
        )
        bodies = [body for (text,) in rows if (body := json.loads(text)).get("attached")]
        return [each["address"] for body in bodies for each in body.get("addresses", [])] if bodies else None

    def name_of(self, view: View, packed: bytes) -> str:
        """Return `<name>.<network>` of an address on the networks of a view, "" when nobody has it."""
        for network_id, network in view.networks.items():
            row = (
                self._database()
                .execute(
                    "SELECT endpoints.name FROM addresses JOIN endpoints ON endpoints.id = endpoint_id"
                    " WHERE addresses.network_id = ? AND address = ?",
                    (network_id, packed),
                )
                .fetchone()
            )
            if row and row[0]:
                return f"{row[0]}.{network}"
        return ""
