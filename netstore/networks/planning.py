"""What an attachment means for the store: rows, addresses, ports, names, the default route; inside one transaction.

Everything here runs inside a commit and changes no kernel. The schema's keys decide what is taken; when one refuses,
the holder is looked up for the message.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from netstore.drivers.options import INTERFACE, MAC_ADDRESS
from netstore.errors import AddressTaken, AlreadyExists, FailedPrecondition, InvalidArgument, NetstoreError, NotFound
from netstore.kernel.sandboxes import interface_names, ways_out
from netstore.model import (
    Endpoint,
    EndpointSpec,
    Kind,
    Network,
    PortMapping,
    Sandbox,
    SandboxRef,
    Scope,
    Service,
    new_id,
    stable_mac,
)
from netstore.networks import ipam, ports, way_out
from netstore.networks.sandboxes import OpenSandbox, known_sandbox
from netstore.store import Transaction

__all__ = [
    "AttachRequest",
    "Joined",
    "Place",
    "Plan",
    "activate",
    "all_joined",
    "attach",
    "changes",
    "changes_of_labels",
    "detach",
    "each",
    "endpoint_on",
    "forget",
    "joined",
    "joined_or_none",
    "park",
    "publish",
    "refuse_other",
    "register_names",
    "reserve",
    "unpublish",
    "without_lease",
]

_MESH_PORTS = 60  # all of them exchanged for others, with what else it holds, are one transaction of etcd's

Joined = tuple[Endpoint, Network, Sandbox]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachRequest:
    """One attachment that a caller asks for. `dns_servers` are for a sandbox that is not known yet.

    `port_keeper` is the name of processes that keep host ports free for the caller (podman's conmon), "" for none.
    """

    network: str
    sandbox: SandboxRef
    spec: EndpointSpec
    labels: Mapping[str, str] = field(default_factory=dict)
    dns_servers: tuple[str, ...] = ()
    port_keeper: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """An endpoint as committed, and where it goes. `fresh` is false for one that was attached before, or is not to be
    yet; `made` says that its row is new; `demoted` had the default route that it has now.
    """

    endpoint: Endpoint
    network: Network
    opened: OpenSandbox
    fresh: bool = True
    made: bool = False
    demoted: tuple[Network, Endpoint] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an endpoint goes: its sandbox, the endpoints that are there, names that interfaces have inside, and whether
    one that is not ours leads out.
    """

    sandbox: Sandbox
    others: Sequence[Endpoint] = ()
    interfaces: frozenset[str] = frozenset()
    leads_out: bool = False


def attach(tx: Transaction, pairs: Sequence[tuple[AttachRequest, OpenSandbox]], request_id: str) -> list[Plan]:
    """Plan several attachments, all or none.

    Raises:
        NotFound, InvalidArgument, AlreadyExists, AddressTaken, Exhausted: metadata `index` says for which.
    """
    answered = tx.answered(request_id, "AttachEndpoints")
    if answered:
        found = [joined(tx, tx.endpoints.require(made)) for made in answered]
        return [Plan(e, n, OpenSandbox(s, None), fresh=False) for e, n, s in found]
    planned: list[Plan] = []
    for index, (request, opened) in enumerate(pairs):
        try:
            planned.append(_attach_one(tx, request, opened))
        except NetstoreError as error:
            error.metadata.setdefault("index", str(index))
            raise
    tx.answer(request_id, "AttachEndpoints", [plan.endpoint.id for plan in planned])
    return planned


def _attach_one(tx: Transaction, request: AttachRequest, opened: OpenSandbox) -> Plan:
    network = tx.networks.find(request.network)
    if network.predefined and not network.interface:
        raise FailedPrecondition(
            f"network {network.name} cannot be attached to a sandbox that exists",
            hint="give `--network host` or `--network none` when the container is created",
        )
    known = known_sandbox(tx, opened.sandbox)
    opened = replace(opened, sandbox=known or replace(opened.sandbox, dns_servers=request.dns_servers))
    sandbox = opened.sandbox
    others: list[Endpoint] = []
    if known is None:
        _insert_sandbox(tx, sandbox)
    else:
        others = tx.endpoints.all("sandbox_id = ?", sandbox.id)
    for present in others:
        if present.network_id == network.id:
            return Plan(_same(present, network, request.spec), network, opened, fresh=False)
    name, live, labels = "", True, request.labels
    if sandbox.container_id:
        container = tx.containers.require(sandbox.container_id)
        name, live, labels = container.name, _is_live(tx, sandbox), {**container.labels, **labels}
    interfaces = _interfaces(opened)
    ours = {each.interface_name for each in others}
    out = bool(interfaces - {"lo"} - ours) and opened.namespace is not None and bool(ways_out(opened.namespace) - ours)
    place = Place(sandbox=sandbox, others=others, interfaces=interfaces, leads_out=out)
    endpoint = reserve(
        tx, network, place, request.spec, name=name, labels=labels, attached=live, port_keeper=request.port_keeper
    )
    return Plan(endpoint, network, opened, fresh=live, made=True, demoted=way_out.demoted(tx, endpoint, others))


def _interfaces(opened: OpenSandbox) -> frozenset[str]:
    return frozenset() if opened.namespace is None else frozenset(interface_names(opened.namespace))


def _insert_sandbox(tx: Transaction, sandbox: Sandbox) -> None:
    try:
        tx.sandboxes.insert(sandbox)
    except sqlite3.IntegrityError:  # another namespace was at this path before, and ended; its endpoints did with it
        for stale in tx.sandboxes.all("path = ?", sandbox.path):
            for endpoint in tx.endpoints.all("sandbox_id = ?", stale.id):
                forget(tx, endpoint)
        tx.sandboxes.insert(sandbox)


def _same(present: Endpoint, network: Network, asked: EndpointSpec) -> Endpoint:
    difference = changes(asked, present.spec)
    if difference:
        raise AlreadyExists(
            f"the sandbox is attached to network {network.name} already, and differs: {difference}",
            hint="detach it first (`netstore network disconnect`)", difference=difference,
        )  # fmt: skip
    return present


def _is_live(tx: Transaction, sandbox: Sandbox) -> bool:
    """Say whether a container runs in the sandbox: until then its endpoints are reservations."""
    condition = "sandbox_id = ? AND json_extract(body, '$.state') = 'running'"
    return bool(tx.containers.count(condition, sandbox.id))


def reserve(
    tx: Transaction, network: Network, place: Place, spec: EndpointSpec, *,
    name: str = "", labels: Mapping[str, str] | None = None, attached: bool, port_keeper: str = "",
) -> Endpoint:  # fmt: skip
    """Add an endpoint's row and take its addresses; ports too when it is to be attached at once.

    Raises:
        AddressTaken, Exhausted, InvalidArgument: see the contract.
    """
    if network.spec.config_only:
        raise FailedPrecondition(
            f"network {network.name} only holds a configuration",
            hint=f"create a network from it (`netstore network create --config-from {network.name} NAME`)",
        )
    sandbox, endpoint_id, name = place.sandbox, new_id(), spec.name or name
    if network.predefined and spec.aliases:
        accepted = f"nothing on network {network.name}: names are answered on networks that you created"
        raise InvalidArgument("spec.aliases", list(spec.aliases), accepted)
    for link in spec.links if network.predefined else ():  # elsewhere a link may come before what it names
        tx.containers.find(link.partition(":")[0])
    where = {"network": network.name} | ({"container": sandbox.container_id} if sandbox.container_id else {})
    revision = tx.event(Kind.ENDPOINT, "connect" if attached else "reserve", endpoint_id, name, **where)
    endpoint = Endpoint(
        id=endpoint_id, network_id=network.id, sandbox_id=sandbox.id, spec=spec, name=name, labels=dict(labels or {}),
        create_time=time.time(), attached=attached, revision=revision,
    )  # fmt: skip
    if network.interface:
        addresses = ipam.allocate(tx, network, endpoint_id, spec)
        # Whoever gets an address again has the MAC that its neighbours know it by.
        identity = f"{network.id} {addresses[0].address}" if addresses else endpoint_id
        endpoint = replace(
            endpoint,
            mac_address=spec.mac_address or spec.options.get(MAC_ADDRESS) or stable_mac(identity),
            interface_name=_asked_interface(place, spec) or _free_interface(place, _interface_prefix(network)),
            addresses=addresses,
            link_local_addresses=ipam.hold_link_local(tx, network, endpoint_id, spec),
        )
        if attached and spec.ports:
            claimed = ports.claim(tx, endpoint_id, _publishable(network, endpoint, spec.ports), keeper=port_keeper)
            endpoint = replace(endpoint, ports=claimed)
        endpoint = way_out.take(tx, network, endpoint, place.others, taken=place.leads_out)
    try:
        tx.endpoints.insert(endpoint)
    except sqlite3.IntegrityError:
        _name_twin(tx, endpoint, network)
        raise
    if network.interface:
        _insert_names(tx, network, endpoint, sandbox)
    return endpoint


def _interface_prefix(network: Network) -> str:
    return network.spec.options.get("com.docker.network.container_iface_prefix", "eth")


def _asked_interface(place: Place, spec: EndpointSpec) -> str:
    name = spec.interface_name or spec.options.get(INTERFACE, "")
    if name and name in place.interfaces - {each.interface_name for each in place.others}:
        raise AddressTaken(
            f"spec.interface_name: the sandbox has an interface {name} already, which is not ours",
            hint="choose another interface name, or none",
        )
    return name


def _free_interface(place: Place, prefix: str) -> str:
    used = place.interfaces | {endpoint.interface_name for endpoint in place.others}
    return next(name for number in range(len(used) + 1) if (name := f"{prefix}{number}") not in used)


def _name_twin(tx: Transaction, endpoint: Endpoint, network: Network) -> None:
    """Name the holder of a MAC or an interface name that a key refused."""
    for present in tx.endpoints.all("network_id = ? AND mac = ?", network.id, endpoint.mac_address):
        holder = present.name or present.id[:12]
        raise AddressTaken(
            f"spec.mac_address: {endpoint.mac_address} of network {network.name} is taken by endpoint {holder}",
            hint="choose another MAC address, or none", holder=holder,
        )  # fmt: skip
    condition = "sandbox_id = ? AND interface_name = ?"
    for present in tx.endpoints.all(condition, endpoint.sandbox_id, endpoint.interface_name):
        raise AddressTaken(
            f"spec.interface_name: {endpoint.interface_name} is taken by another endpoint of the sandbox",
            hint="choose another interface name, or none", holder=present.id,
        )  # fmt: skip


def register_names(tx: Transaction, network: Network, endpoint: Endpoint, sandbox: Sandbox) -> None:
    """Replace what netstore-resolver answers for an endpoint."""
    tx.execute("DELETE FROM names WHERE endpoint_id = ?", endpoint.id)
    _insert_names(tx, network, endpoint, sandbox)


def _insert_names(tx: Transaction, network: Network, endpoint: Endpoint, sandbox: Sandbox) -> None:
    if network.predefined:  # on the default network nothing is resolved, as Docker
        return
    names = {endpoint.name, *endpoint.spec.aliases, sandbox.container_id[:12]}
    container = tx.containers.get(sandbox.container_id) if sandbox.container_id else None
    if container and (hostname := container.spec.hostname):
        domain = container.spec.domainname
        names |= {hostname, f"{hostname}.{domain}" if domain else ""}
    for name in {name.lower() for name in names - {""}}:
        tx.execute("INSERT INTO names VALUES (?, ?, ?)", network.id, name, endpoint.id)


def _publishable(network: Network, endpoint: Endpoint, wanted: Sequence[PortMapping]) -> list[PortMapping]:
    """Return ports with the network's default host address where they name none.

    Raises:
        FailedPrecondition: they cannot be published for this endpoint, or not on such an address.
    """
    if network.spec.internal:
        raise FailedPrecondition(
            f"network {network.name} is internal: its ports cannot be published",
            hint="use a network that is not internal",
        )
    if not endpoint.attached:
        raise FailedPrecondition(f"endpoint {endpoint.id[:12]} is not attached", hint="start its container first")
    default = network.spec.options.get("com.docker.network.bridge.host_binding_ipv4", "")
    default = "" if default == "0.0.0.0" else default
    for port in wanted:
        _refuse_mesh(network, port)
    shared = {(port.protocol, port.host_port) for port in (*endpoint.ports, *wanted) if port.mesh}
    if len(shared) > _MESH_PORTS:
        accepted = f"at most {_MESH_PORTS} ports of an endpoint on every node; publish others on its own (no --mesh)"
        raise InvalidArgument("ports", f"{len(shared)} ports", accepted)
    bound = [
        replace(port, host_ip=default) if not port.host_ip and default and not port.mesh else port for port in wanted
    ]
    families = {":" in each.address for each in endpoint.addresses}
    for port in bound:  # ::1 is relayed to either family
        if not families or (port.host_ip not in ("", "::1") and (":" in port.host_ip) not in families):
            raise FailedPrecondition(
                f"host address {port.host_ip or '0.0.0.0'}: the endpoint has no such address on network {network.name}",
                hint="publish on an address of a family that it has, or on none",
            )
    return bound


def _refuse_mesh(network: Network, port: PortMapping) -> None:
    """Refuse a port that cannot be every node's."""
    if not port.mesh:
        return
    if network.scope is not Scope.GLOBAL:
        raise FailedPrecondition(
            f"network {network.name} is on this node alone: no other node can publish its ports",
            hint="use an overlay network, or leave out --mesh",
        )
    if not port.host_port or port.host_port_last or port.host_ip or port.count > 1:
        raise FailedPrecondition(
            "a port that every node publishes names its host port, no host address, and is no range",
            hint="publish HOSTPORT:PORT, each port by itself",
        )


def activate(tx: Transaction, opened: OpenSandbox, wanted: Mapping[str, Sequence[PortMapping]]) -> list[Plan]:
    """Plan the attachment of every reserved endpoint of a container's sandbox, with these ports by endpoint id."""
    planned = []
    for endpoint in tx.endpoints.all("sandbox_id = ?", opened.sandbox.id):
        if endpoint.attached:
            continue
        network = tx.networks.require(endpoint.network_id)
        endpoint = replace(endpoint, attached=True)
        if wanted.get(endpoint.id):
            claimed = ports.claim(tx, endpoint.id, _publishable(network, endpoint, wanted[endpoint.id]))
            endpoint = replace(endpoint, ports=claimed)
        where = {"network": network.name, "container": opened.sandbox.container_id}
        endpoint = replace(endpoint, revision=tx.event(Kind.ENDPOINT, "connect", endpoint.id, endpoint.name, **where))
        tx.endpoints.update(endpoint)
        planned.append(Plan(endpoint, network, opened))
    return planned


def park(tx: Transaction, endpoint: Endpoint) -> None:
    """Make an endpoint a reservation: its addresses stay, its ports are freed."""
    present = tx.endpoints.get(endpoint.id)  # as it is by now: its labels may have changed
    if present is None:
        return
    ports.release(tx, endpoint.id)
    tx.execute("DELETE FROM service_health WHERE endpoint_id = ?", endpoint.id)
    present = without_lease(tx, present)
    revision = tx.event(Kind.ENDPOINT, "disconnect", endpoint.id, endpoint.name)
    tx.endpoints.update(replace(present, attached=False, ports=(), revision=revision))


def without_lease(tx: Transaction, endpoint: Endpoint) -> Endpoint:
    """Return an endpoint without the address that a server lent it, which is free again; the caller writes the row."""
    if endpoint.lease is None:
        return endpoint
    tx.execute("DELETE FROM addresses WHERE endpoint_id = ?", endpoint.id)
    return replace(endpoint, addresses=(), lease=None)


def publish(
    tx: Transaction, reference: str, wanted: Sequence[PortMapping], *, keeper: str = ""
) -> tuple[Endpoint, Network, Sandbox, tuple[PortMapping, ...]]:
    """Take further ports for a live endpoint; those published already stay. Returns the new ones last."""
    endpoint, network, sandbox = joined(tx, tx.endpoints.find(reference, by_name=False))
    bound = _publishable(network, endpoint, wanted)
    unheld = [port for port in bound if not port.host_port or not ports.matching(endpoint.ports, port)]
    new = ports.claim(tx, endpoint.id, unheld, keeper=keeper)
    revision = tx.event(Kind.ENDPOINT, "publish", endpoint.id, endpoint.name, network=network.name)
    endpoint = replace(endpoint, ports=(*endpoint.ports, *new), revision=revision)
    tx.endpoints.update(endpoint)
    return endpoint, network, sandbox, new


def unpublish(
    tx: Transaction, reference: str, unwanted: Sequence[PortMapping]
) -> tuple[Endpoint, Network, Sandbox, tuple[PortMapping, ...]]:
    """Free ports of an endpoint; those that are not published are ignored. Returns the freed ones last."""
    endpoint, network, sandbox = joined(tx, tx.endpoints.find(reference, by_name=False))
    gone = tuple(dict.fromkeys(found for port in unwanted for found in ports.matching(endpoint.ports, port)))
    ports.release(tx, endpoint.id, gone)
    revision = tx.event(Kind.ENDPOINT, "unpublish", endpoint.id, endpoint.name, network=network.name)
    endpoint = replace(endpoint, ports=tuple(p for p in endpoint.ports if p not in gone), revision=revision)
    tx.endpoints.update(endpoint)
    return endpoint, network, sandbox, gone


def detach(tx: Transaction, endpoint_id: str) -> tuple[tuple[Endpoint, Network] | None, bool]:
    """Forget an endpoint; returns who gets the default route instead, and whether it was the sandbox's last."""
    endpoint = tx.endpoints.get(endpoint_id)
    if endpoint is None:
        return None, False
    forget(tx, endpoint)
    others = tx.endpoints.all("sandbox_id = ?", endpoint.sandbox_id)
    return way_out.pass_on(tx, others) if endpoint.default_route else None, not others


def forget(tx: Transaction, endpoint: Endpoint) -> None:
    """Remove an endpoint's row, and that of a sandbox that an engine named when it was the last."""
    tx.event(Kind.ENDPOINT, "disconnect", endpoint.id, endpoint.name)
    tx.endpoints.delete(endpoint.id)
    sandbox = tx.sandboxes.get(endpoint.sandbox_id)
    if sandbox and not sandbox.container_id and not tx.endpoints.count("sandbox_id = ?", sandbox.id):
        tx.sandboxes.delete(sandbox.id)


def each(tx: Transaction, change: Callable[[Transaction, Endpoint], None], plans: Sequence[Plan]) -> None:
    """Make one change to the endpoint of every plan."""
    for plan in plans:
        change(tx, plan.endpoint)


def joined(tx: Transaction, endpoint: Endpoint) -> Joined:
    """Return an endpoint with its network and its sandbox."""
    return endpoint, tx.networks.require(endpoint.network_id), tx.sandboxes.require(endpoint.sandbox_id)


def all_joined(tx: Transaction, where: str, *values: object) -> list[Joined]:
    """Return the endpoints that an SQL condition selects, oldest first, with their networks and sandboxes."""
    networks = {each.id: each for each in tx.networks.all()}
    theirs = f"id IN (SELECT sandbox_id FROM endpoints WHERE {where})"
    sandboxes = {each.id: each for each in tx.sandboxes.all(theirs, *values)}
    found = tx.endpoints.all(where, *values)
    return [(each, networks[each.network_id], sandboxes[each.sandbox_id]) for each in found]


def joined_or_none(tx: Transaction, endpoint_id: str) -> Joined | None:
    """Return an endpoint with its network and its sandbox, None when it is gone."""
    endpoint = tx.endpoints.get(endpoint_id)
    return joined(tx, endpoint) if endpoint else None


def endpoint_on(tx: Transaction, reference: str, sandbox: Sandbox) -> Endpoint:
    """Return the endpoint of a sandbox on a network.

    Raises:
        NotFound: it is not attached to it.
    """
    network = tx.networks.find(reference)
    for endpoint in tx.endpoints.all("network_id = ? AND sandbox_id = ?", network.id, sandbox.id):
        return endpoint
    container = tx.containers.get(sandbox.container_id)
    who = container.name if container else sandbox.path
    raise NotFound("endpoint", f"of {who} on network {network.name}", hint="it is not connected to it")


def changes(asked: object, present: object) -> str:
    """Say in which fields two dataclasses differ, and how where a value is a word or a number; "" when in none."""
    said = []
    for name in asked.__dataclass_fields__:  # type: ignore[attr-defined]
        there, wanted = getattr(present, name), getattr(asked, name)
        if there != wanted and isinstance(there, str | int | float) and isinstance(wanted, str | int | float):
            there, wanted = (str(each) if isinstance(each, Enum) else repr(each) for each in (there, wanted))
            said.append(f"{name} is {there}, asked for {wanted}")
        elif there != wanted:
            said.append(f"{name} differs")
    return ", ".join(said)


def changes_of_labels(asked: Mapping[str, str], present: Mapping[str, str]) -> str:
    """Say that labels differ, "" when they do not."""
    return "" if dict(asked) == dict(present) else f"labels is {dict(present)!r}, asked for {dict(asked)!r}"


def refuse_other(kind: Kind, asked: Network | Service, present: Network | Service) -> None:
    """Refuse to make what is not as that which has its name.

    Raises:
        AlreadyExists: their specs or labels differ.
    """
    difference = changes(asked.spec, present.spec) or changes_of_labels(asked.labels, present.labels)
    if difference:
        raise AlreadyExists(
            f"{kind} {asked.name} exists and differs: {difference}",
            hint=f"choose another name, or remove the {kind} first", difference=difference,
        )  # fmt: skip
