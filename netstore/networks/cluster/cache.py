"""The node's picture of what the cluster shares: rows, inside one transaction.

It is what the data plane and the resolver go by, so that both come back while etcd is away. `apply` takes what a watch
saw and returns what the kernel has to follow.
"""

from __future__ import annotations

import ipaddress
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from netstore.errors import NetstoreError
from netstore.model import Address, Kind, Network, Node, PolicyAction, RemoteEndpoint, host_id
from netstore.networks import ipam, ports, service_rows
from netstore.networks.balance import decode_service
from netstore.networks.cluster.records import (
    ALIVE,
    CHECKS,
    ENDPOINTS,
    HOSTS,
    NETWORKS,
    NODES,
    POLICIES,
    SERVICES,
    CheckRequest,
    EndpointRecord,
    decode_endpoint,
    decode_network,
    decode_node,
    decode_policies,
    decode_request,
    encode,
)
from netstore.store import Transaction
from netstore.store.etcd import KeyValue

__all__ = [
    "Effect", "Picture", "Seen", "differences", "forget_network", "host_record", "hosts", "import_network",
    "peers", "remotes", "retry_mesh", "unpublished", "users", "visible", "waiting_mesh",
]  # fmt: skip

Seen = tuple[bool, KeyValue]
"""What a watch saw: whether the key was put or deleted, and what it was."""


@dataclass(slots=True)
class Effect:
    """What the kernel has to follow. `refused` are networks and services that cannot be here, by id, and why."""

    add: dict[str, list[RemoteEndpoint]] = field(default_factory=dict)
    remove: dict[str, list[RemoteEndpoint]] = field(default_factory=dict)
    gone: list[Network] = field(default_factory=list)
    services: set[str] = field(default_factory=set)
    """Networks, by id, whose services changed."""
    touched: set[str] = field(default_factory=set)
    """Networks, by id, of whose endpoints something changed, their health too, which packets do not go by."""
    changed: list[Network] = field(default_factory=list)
    """As the cluster has them now; here they are still as they were."""
    policed: set[str] = field(default_factory=set)
    """Networks, by id, whose policies changed."""
    peers: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    strays: list[EndpointRecord] = field(default_factory=list)
    """Records of this node's own whose endpoint it does not have."""
    checks: list[CheckRequest] = field(default_factory=list)
    """Other nodes ask how a network is here."""
    removed_here: bool = False
    """Somebody removed this node from the cluster."""
    lapsed_here: bool = False
    """This node is taken for lost: a registration of an earlier session, made late, bound it to a lease that ended."""


@dataclass(slots=True)
class _Batch:
    """What one `apply` has found out. Endpoints are remembered as they were before their first change."""

    tx: Transaction
    effect: Effect = field(default_factory=Effect)
    before: dict[str, RemoteEndpoint | None] = field(default_factory=dict)
    inserted: dict[str, EndpointRecord] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    """Endpoints that have rows, of those that were touched."""
    _up: dict[str, bool] = field(default_factory=dict)
    _here: dict[str, bool] = field(default_factory=dict)

    def touch(self, endpoint_ids: Iterable[str]) -> None:
        """Remember how endpoints are, before they change."""
        for endpoint_id in endpoint_ids:
            if endpoint_id not in self.before:
                row = self.tx.row("SELECT body FROM remote_endpoints WHERE id = ?", endpoint_id)
                self.before[endpoint_id] = self._visible(decode_endpoint(row[0])) if row else None
                if row:
                    self.held.add(endpoint_id)

    def drop(self, endpoint_id: str) -> None:
        """Take an endpoint's rows away, where there are some."""
        self.touch([endpoint_id])
        if endpoint_id in self.held:
            _drop(self.tx, endpoint_id)
            self.held.discard(endpoint_id)
            self.inserted.pop(endpoint_id, None)

    def insert(self, record: EndpointRecord, body: str) -> None:
        """Put an endpoint's rows in place of what there is of it."""
        self.drop(record.id)
        _insert(self.tx, record, body)
        self.held.add(record.id)
        self.inserted[record.id] = record

    def is_here(self, network_id: str) -> bool:
        """Say whether this node has a row for a network of the cluster."""
        if network_id not in self._here:
            found = self.tx.row("SELECT 1 FROM global_networks WHERE network_id = ?", network_id)
            self._here[network_id] = found is not None
        return self._here[network_id]

    def forget(self) -> None:
        """Look again at what may have changed: nodes that are up, networks that are here, and what went with one."""
        self._up.clear()
        self._here.clear()
        self.inserted.clear()

    def finish(self) -> Effect:
        """Compare what packets can go to now with what they could."""
        effect = self.effect
        for endpoint_id, old in self.before.items():
            new = self._now(endpoint_id)
            if old == new:
                continue
            effect.touched.update(each.network_id for each in (old, new) if each)
            if old:
                effect.remove.setdefault(old.network_id, []).append(old)
            if new:
                effect.add.setdefault(new.network_id, []).append(new)
        return effect

    def _now(self, endpoint_id: str) -> RemoteEndpoint | None:
        record = self.inserted.get(endpoint_id)
        if record is None and endpoint_id in self.held:
            row = self.tx.row("SELECT body FROM remote_endpoints WHERE id = ?", endpoint_id)
            record = decode_endpoint(row[0]) if row else None  # it may have gone with its network
        return self._visible(record) if record else None

    def _visible(self, record: EndpointRecord) -> RemoteEndpoint | None:
        """Return an endpoint that packets can go to."""
        return _remote(self.tx, record) if record.attached and self._is_up(record.node_id) else None

    def _is_up(self, node_id: str) -> bool:
        if node_id not in self._up:
            row = self.tx.row("SELECT up FROM nodes WHERE id = ?", node_id)
            self._up[node_id] = bool(row and row[0])
        return self._up[node_id]


@dataclass(frozen=True, slots=True)
class Picture:
    """Whose picture it is, and how a network of the cluster becomes this node's."""

    node_id: str
    localise: Callable[[Network], Network]

    def apply(self, tx: Transaction, seen: Sequence[Seen]) -> Effect:
        """Take up what was seen, in order."""
        batch = _Batch(tx)
        for put, item in seen:
            if item.key.startswith((ENDPOINTS, HOSTS)):
                self._endpoint(batch, item, put=put)
            elif item.key.startswith(ALIVE):
                self._alive(batch, item.key.removeprefix(ALIVE), up=put)
            elif item.key.startswith(NODES):
                self._node(batch, item, put=put)
            elif item.key.startswith(SERVICES):
                self._service(tx, batch.effect, item, put=put)
            elif item.key.startswith(NETWORKS):
                self._network(tx, batch.effect, item, put=put)
                batch.forget()
            elif item.key.startswith(POLICIES) and put:
                self._policies(tx, batch.effect, item)
            elif item.key.startswith(CHECKS) and put:
                batch.effect.checks.append(decode_request(item.value))
        return batch.finish()

    def _node(self, batch: _Batch, item: KeyValue, *, put: bool) -> None:
        tx, effect, node_id = batch.tx, batch.effect, item.key.removeprefix(NODES)
        present = tx.nodes.get(node_id)
        effect.peers = True
        if not put:
            effect.removed_here |= node_id == self.node_id
            batch.touch(_of_node(tx, node_id))
            batch.forget()
            if present:
                tx.nodes.delete(node_id)
                tx.event(Kind.NODE, "remove", node_id, present.name)
            return
        node = replace(decode_node(item.value), up=bool(present and present.up), revision=item.revision)
        if present is None:
            tx.nodes.insert(node)
            tx.event(Kind.NODE, "join", node_id, node.name, address=node.address)
        elif present != node:
            tx.nodes.update(node)
            if present.drained != node.drained:
                tx.event(Kind.NODE, "drain" if node.drained else "undrain", node_id, node.name)

    def _alive(self, batch: _Batch, node_id: str, *, up: bool) -> None:
        tx = batch.tx
        if node_id == self.node_id:
            batch.effect.lapsed_here = not up
        node = tx.nodes.get(node_id)
        if node is None or node.up == up:
            return
        batch.touch(_of_node(tx, node_id))
        batch.forget()
        tx.nodes.update(replace(node, up=up))
        _follow_mesh(tx, node_id, up=up)
        tx.event(Kind.NODE, "up" if up else "down", node_id, node.name, address=node.address)
        batch.effect.peers = True

    def _network(self, tx: Transaction, effect: Effect, item: KeyValue, *, put: bool) -> None:
        network_id = item.key.removeprefix(NETWORKS)
        if not put:
            gone = tx.networks.get(network_id)
            if gone and forget_network(tx, gone):
                effect.gone.append(gone)
            return
        if tx.row("SELECT 1 FROM unpublished_removals WHERE network_id = ?", network_id):
            return
        network = decode_network(item.value)
        present = tx.networks.get(network_id)
        if present:
            if (present.spec, present.pools, present.labels) != (network.spec, network.pools, network.labels):
                effect.changed.append(network)
            return
        try:
            import_network(tx, network, self.localise)
            if PolicyAction.DENY in (network.spec.policy_ingress, network.spec.policy_egress):
                effect.policed.add(network_id)
        except (NetstoreError, sqlite3.IntegrityError) as error:
            effect.refused[network_id] = str(error)

    def _service(self, tx: Transaction, effect: Effect, item: KeyValue, *, put: bool) -> None:
        _, network_id, service_id = item.key.rsplit("/", 2)
        if not put:
            if present := tx.services.get(service_id):
                service_rows.delete(tx, present)
        elif tx.row("SELECT 1 FROM global_networks WHERE network_id = ?", network_id):
            service = replace(decode_service(item.value), revision=item.revision)
            try:
                service_rows.take_up(tx, service)
            except sqlite3.IntegrityError:
                effect.refused[service_id] = f"service {service.name} of this node has its name"
                return
        effect.services.add(network_id)

    def _policies(self, tx: Transaction, effect: Effect, item: KeyValue) -> None:
        network = tx.networks.get(item.key.removeprefix(POLICIES))
        if network is None:
            return  # it cannot be here; listed anew when it can
        wanted = {each.id: each for each in decode_policies(item.value)}
        held = {each.id: each for each in tx.policies.all("network_id = ?", network.id)}
        for gone in held.keys() - wanted.keys():
            tx.event(Kind.POLICY, "remove", gone, held[gone].name, network=network.name)
            tx.policies.delete(gone)
            effect.policed.add(network.id)
        for policy in wanted.values():
            present = held.get(policy.id)
            if present and replace(present, revision=0) == policy:
                continue
            try:
                kept = replace(policy, revision=tx.event(Kind.POLICY, "update" if present else "create", policy.id,
                                                         policy.name, network=network.name))  # fmt: skip
                (tx.policies.update if present else tx.policies.insert)(kept)
            except sqlite3.IntegrityError:
                effect.refused[policy.id] = f"policy {policy.name}: one of a network of this node has its name"
                continue
            effect.policed.add(network.id)

    def _endpoint(self, batch: _Batch, item: KeyValue, *, put: bool) -> None:
        _, network_id, last = item.key.rsplit("/", 2)
        batch.effect.touched.add(network_id)
        if not put:
            batch.drop(host_id(network_id, last) if item.key.startswith(HOSTS) else last)
            return
        record = decode_endpoint(item.value)
        if record.node_id == self.node_id:
            if item.key.startswith(ENDPOINTS) and batch.tx.endpoints.get(record.id) is None:
                batch.effect.strays.append(record)
        elif batch.is_here(network_id):  # else it cannot be here; listed anew when it can
            batch.insert(record, item.value.decode())


def _of_node(tx: Transaction, node_id: str) -> list[str]:
    return [row[0] for row in tx.rows("SELECT id FROM remote_endpoints WHERE node_id = ?", node_id)]


def visible(tx: Transaction, endpoint_id: str) -> RemoteEndpoint | None:
    """Return an endpoint that packets can go to."""
    row = tx.row(
        "SELECT remote_endpoints.body FROM remote_endpoints JOIN nodes ON nodes.id = node_id"
        " WHERE remote_endpoints.id = ? AND up", endpoint_id,
    )  # fmt: skip
    record = decode_endpoint(row[0]) if row else None
    return _remote(tx, record) if record and record.attached else None


def _remote(tx: Transaction, record: EndpointRecord) -> RemoteEndpoint:
    return replace(record.remote, ports=ports.held_for_mesh(tx, record.id, record.ports))


def _follow_mesh(tx: Transaction, node_id: str, *, up: bool) -> None:
    """Publish what a node that is up has for every node, and nothing of one that is lost."""
    theirs = "endpoint_id IN (SELECT id FROM remote_endpoints WHERE node_id = ?)"
    if not up:
        tx.execute(f"UPDATE mesh_ports SET held = 0 WHERE {theirs}", node_id)
        return
    for (endpoint_id,) in tx.rows(f"SELECT DISTINCT endpoint_id FROM mesh_ports WHERE {theirs}", node_id):
        ports.claim_for_mesh(tx, endpoint_id)


def waiting_mesh(tx: Transaction) -> list[str]:
    """Return the endpoints, by id, of nodes that are up, of which this node does not publish everything."""
    waiting = (
        "SELECT DISTINCT endpoint_id FROM mesh_ports JOIN remote_endpoints ON remote_endpoints.id = endpoint_id"
        " JOIN nodes ON nodes.id = node_id WHERE NOT held AND up"
    )
    return [endpoint_id for (endpoint_id,) in tx.rows(waiting)]


def retry_mesh(tx: Transaction) -> list[RemoteEndpoint]:
    """Try again to publish what others had; returns the endpoints of which something is published now."""
    found = []
    for endpoint_id in waiting_mesh(tx):
        before = visible(tx, endpoint_id)
        ports.claim_for_mesh(tx, endpoint_id)
        after = visible(tx, endpoint_id)
        if after and after != before:
            found.append(after)
    return found


def _insert(tx: Transaction, record: EndpointRecord, body: str) -> None:
    values = record.id, record.network_id, record.node_id, body
    tx.execute("INSERT INTO remote_endpoints VALUES (?, ?, ?, ?)", *values)
    for name in record.names if record.attached else ():
        tx.execute("INSERT OR IGNORE INTO remote_names VALUES (?, ?, ?)", record.network_id, name, record.id)
    for address in record.addresses:
        packed = ipaddress.ip_address(address).packed
        tx.execute("INSERT INTO remote_addresses VALUES (?, ?, ?)", record.network_id, packed, record.id)
        # One that an endpoint here has meanwhile is settled by who claims it in etcd.
        tx.execute("INSERT OR IGNORE INTO addresses VALUES (?, ?, NULL)", record.network_id, packed)
    for port in record.ports:
        wanted = record.id, port.protocol.value, port.host_port
        tx.execute("INSERT OR IGNORE INTO mesh_ports VALUES (?, ?, ?, 0)", *wanted)
    node = tx.nodes.get(record.node_id) if record.ports else None
    for taken in ports.claim_for_mesh(tx, record.id) if node and node.up else ():
        tx.event(Kind.ENDPOINT, "port-taken", record.id, record.name, detail=taken)


def _drop(tx: Transaction, endpoint_id: str) -> None:
    tx.execute(
        "DELETE FROM addresses WHERE endpoint_id IS NULL AND (network_id, address) IN"
        " (SELECT network_id, address FROM remote_addresses WHERE endpoint_id = ?)", endpoint_id,
    )  # fmt: skip
    tx.execute("DELETE FROM remote_endpoints WHERE id = ?", endpoint_id)


def import_network(tx: Transaction, network: Network, localise: Callable[[Network], Network]) -> Network:
    """Add the row of a network of the cluster; returns it as it is here.

    Raises:
        NetstoreError, sqlite3.IntegrityError: it cannot be here beside what there is; nothing is changed.
    """
    tx.execute("SAVEPOINT import")
    try:
        network = localise(network)
        twin = tx.row("SELECT id FROM networks WHERE name = ?", network.name)
        if twin:
            raise NetstoreError(f"network {network.name} of this node, {twin[0][:12]}, has its name", hint="remove it")
        revision = tx.event(Kind.NETWORK, "create", network.id, network.name, driver=network.spec.driver)
        network = replace(network, revision=revision)
        tx.networks.insert(network)
        tx.execute("INSERT INTO global_networks VALUES (?, ?)", network.id, network.vni)
        for pool in network.pools:
            ipam.reserve_pool(tx, network, pool)
    except BaseException:
        tx.execute("ROLLBACK TO import")
        raise
    finally:
        tx.execute("RELEASE import")
    return network


def forget_network(tx: Transaction, network: Network) -> bool:
    """Remove the row of a network that the cluster has no more; False while endpoints here are on it."""
    if tx.endpoints.count("network_id = ?", network.id):
        return False
    tx.event(Kind.NETWORK, "remove", network.id, network.name)
    tx.networks.delete(network.id)
    return True


def differences(tx: Transaction, items: Sequence[KeyValue]) -> list[Seen]:
    """Return what a watch would have seen between this picture and a snapshot."""
    there = {item.key for item in items}
    seen: list[Seen] = []
    for (found,) in tx.rows("SELECT id FROM nodes"):
        seen += [(False, KeyValue(f"{p}{found}", b"", 0)) for p in (NODES, ALIVE) if f"{p}{found}" not in there]
    for (found,) in tx.rows("SELECT network_id FROM global_networks"):
        seen += [(False, KeyValue(f"{NETWORKS}{found}", b"", 0))] if f"{NETWORKS}{found}" not in there else []
    known: dict[str, str] = {}
    for endpoint_id, network_id, owner, body in tx.rows("SELECT * FROM remote_endpoints"):
        host = endpoint_id == host_id(network_id, owner)
        key = f"{HOSTS}{network_id}/{owner}" if host else f"{ENDPOINTS}{network_id}/{endpoint_id}"
        known[key] = body
        if key not in there:
            seen.append((False, KeyValue(key, b"", 0)))
    for service in tx.services.all("network_id IN (SELECT network_id FROM global_networks)"):
        key = f"{SERVICES}{service.spec.network_id}/{service.id}"
        known[key] = encode(replace(service, revision=0)).decode()
        if key not in there:
            seen.append((False, KeyValue(key, b"", 0)))
    order = (NODES, ALIVE, NETWORKS, POLICIES, HOSTS, ENDPOINTS, SERVICES)
    for prefix in order:
        seen += [
            (True, item) for item in items
            if item.key.startswith(prefix) and known.get(item.key) != item.value.decode()
        ]  # fmt: skip
    return seen


def remotes(tx: Transaction, network_id: str) -> list[RemoteEndpoint]:
    """Return every endpoint of other nodes on a network that packets can go to."""
    rows = tx.rows(
        "SELECT remote_endpoints.body FROM remote_endpoints JOIN nodes ON nodes.id = node_id"
        " WHERE network_id = ? AND up", network_id,
    )  # fmt: skip
    records = [decode_endpoint(body) for (body,) in rows]
    return [_remote(tx, record) for record in records if record.attached]


def hosts(tx: Transaction, network_id: str) -> list[RemoteEndpoint]:
    """Return the addresses of the other nodes that use a network and are up."""
    return [each for each in remotes(tx, network_id) if each.is_node]


def users(tx: Transaction, network_id: str) -> list[str]:
    """Return the names, or ids, of all endpoints of other nodes on a network: reserved ones and lost nodes', too."""
    rows = tx.rows("SELECT body FROM remote_endpoints WHERE network_id = ?", network_id)
    found = [decode_endpoint(body) for (body,) in rows]
    return [each.name or each.id[:12] for each in found if each.id != host_id(network_id, each.node_id)]


def peers(tx: Transaction, node_id: str) -> dict[str, Node]:
    """Return the other nodes that are up, by their addresses."""
    return {node.address: node for node in tx.nodes.all("up AND id != ?", node_id)}


def host_record(network: Network, node: Node, addresses: Sequence[Address], mac: str) -> EndpointRecord:
    """Return the record of a node's own addresses on a network."""
    return EndpointRecord(
        id=host_id(network.id, node.id), network_id=network.id, node_id=node.id, vtep=node.address, mac=mac,
        addresses=tuple(each.address for each in addresses),
    )  # fmt: skip


def unpublished(tx: Transaction) -> tuple[int, dict[str, str]]:
    """Return the newest serial, and by endpoint id the last body, of changes that etcd has not heard of."""
    rows = tx.rows("SELECT serial, endpoint_id, body FROM unpublished ORDER BY serial")
    return (rows[-1][0] if rows else 0), {endpoint_id: body for _, endpoint_id, body in rows}
