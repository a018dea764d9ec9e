"""Which endpoints a service has, and how connections to it are spread over them; netstore-resolver asks here, too."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from netstore.kernel.skeleton import FIRST_SLOT, SLOTS
from netstore.model import Address, Network, Service, ServicePort, label_matches

__all__ = ["Backend", "backends", "decode_service", "elements", "ports_held", "spread"]

_Rows = Callable[..., list[tuple[Any, ...]]]
_HERE = (
    "SELECT body, '', EXISTS (SELECT 1 FROM service_health WHERE service_id = ? AND endpoint_id = endpoints.id)"
    " FROM endpoints WHERE network_id = ?"
)
_ELSEWHERE = (
    "SELECT remote_endpoints.body, node_id, 0 FROM remote_endpoints JOIN nodes ON nodes.id = node_id"
    " WHERE network_id = ? AND up"
)
_OWN = "SELECT json_extract(body, '$.address') FROM nodes WHERE id = (SELECT value FROM meta WHERE key = 'node_id')"

decode_service = msgspec.json.Decoder(Service).decode


class _Endpoint(msgspec.Struct, frozen=True):
    """What of an endpoint's row matters, of this node's and of another's."""

    id: str
    name: str
    attached: bool
    revision: int = 0
    addresses: tuple[Address | str, ...] = ()
    labels: dict[str, str] = {}
    healthy: tuple[str, ...] = ()
    vtep: str = ""
    """Where its node is on the underlay."""


_decode = msgspec.json.Decoder(_Endpoint).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """An attached endpoint that a service selects. `node_id` is "" on this node."""

    endpoint_id: str
    name: str
    node_id: str
    addresses: tuple[str, ...]
    healthy: bool
    revision: int


def backends(rows: _Rows, service: Service) -> list[Backend]:
    """Return a service's endpoints; `rows` runs a query of the store's and returns its rows.

    Those of nodes to which nothing passes, as the other's address on the underlay is of another family, are left out.
    """
    network_id = service.spec.network_id
    elsewhere = rows(_ELSEWHERE, network_id)
    own = next((address for (address,) in rows(_OWN)), "") if elsewhere else ""
    return list(_backends(service, [*rows(_HERE, service.id, network_id), *elsewhere], own))


def _backends(service: Service, found: Sequence[tuple[Any, ...]], own: str) -> Iterator[Backend]:
    for body, node_id, healthy in found:
        endpoint = _decode(body)
        if not endpoint.attached or (own and endpoint.vtep and (":" in endpoint.vtep) != (":" in own)):
            continue
        if not all(label_matches(endpoint.labels, each) for each in service.spec.selector):
            continue
        yield Backend(
            endpoint_id=endpoint.id, name=endpoint.name, node_id=node_id,
            addresses=tuple(each if isinstance(each, str) else each.address for each in endpoint.addresses),
            healthy=service.spec.health is None or bool(healthy) or service.id in endpoint.healthy,
            revision=endpoint.revision,
        )  # fmt: skip


def ports_held(rows: _Rows, service: Service) -> list[ServicePort]:
    """Return the ports that lead to a service on this node: others may have some of those that it asks for."""
    held = rows("SELECT protocol, port FROM service_ports WHERE service_id = ?", service.id)
    return [each for each in service.spec.ports if (each.protocol, each.published_port) in held]


def elements(
    network: Network, service: Service, ports: Sequence[ServicePort], found: Sequence[Backend]
) -> set[tuple[str, str]]:
    """Return the firewall elements that balance a service, and these ports, over its healthy endpoints."""
    wanted: set[tuple[str, str]] = set()
    for six in ("", "6"):
        reached = {
            address: backend for backend in found if backend.healthy
            for address in backend.addresses if (":" in address) == bool(six)
        }  # fmt: skip
        slots = [(FIRST_SLOT + slot, address) for slot, address in enumerate(spread(sorted(reached)))]
        for virtual in service.addresses:
            if (":" in virtual) == bool(six):
                wanted.add((f"services{six}", virtual))
                wanted |= {(f"slots{six}", f"{virtual} . {slot} : {address}") for slot, address in slots}
        for port in ports:
            place = f"{port.protocol} . {port.published_port}"
            wanted.add(("service_ports", place))
            wanted |= {
                (f"port_slots{six}", f"{place} . {slot} : {address} . {port.target_port}") for slot, address in slots
            }
        if ports:
            wanted |= {
                (f"elsewhere{six}", f"{network.interface} . {address}")
                for address, backend in reached.items() if backend.node_id
            }  # fmt: skip
    return wanted


def spread(members: Sequence[str]) -> list[str]:
    """Return who has each slot: as many each as the others, and few change hands when one comes or goes.

    Each in turn takes the next free slot of an order of its own (Eisenbud et al., Maglev, NSDI 2016). Of more members
    than slots some have none.
    """
    orders = [_order(member) for member in members[:SLOTS]]
    table = [""] * SLOTS if members else []
    for turn in range(len(table)):
        index = turn % len(orders)
        slot = next(slot for slot in orders[index] if not table[slot])
        table[slot] = members[index]
    return table


def _order(member: str) -> Iterator[int]:
    digest = hashlib.sha256(member.encode()).digest()
    start, step = int.from_bytes(digest[:8], "big") % SLOTS, int.from_bytes(digest[8:16], "big") % (SLOTS - 1) + 1
    return ((start + step * number) % SLOTS for number in range(SLOTS))
