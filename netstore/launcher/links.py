"""Links of the default network (docker run --link), where no names are answered: lines of /etc/hosts and variables.

On other networks a link is a name of the endpoint's own, and netstore-resolver answers it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

from netstore.errors import NotFound
from netstore.launcher.creation import exposed
from netstore.model import Endpoint, Network, PortMapping
from netstore.store import Transaction

__all__ = ["Link", "environment", "read_links"]

_NOT_PASSED_ON = ("HOME", "PATH")


@dataclass(frozen=True, slots=True)
class Link:
    """Another container, as the linking one knows it: `names` begins with the alias."""

    names: tuple[str, ...]
    addresses: tuple[str, ...]
    ports: tuple[PortMapping, ...]
    env: tuple[str, ...]


def read_links(tx: Transaction, endpoints: Iterable[tuple[Endpoint, Network]]) -> tuple[Link, ...]:
    """Return the links of endpoints on the default network; one whose container was removed is left out."""
    found = []
    for endpoint, network in endpoints:
        for text in endpoint.spec.links if network.predefined else ():
            with contextlib.suppress(NotFound):
                found.append(_read_link(tx, network, text))
    return tuple(link for link in found if link.addresses)


def _read_link(tx: Transaction, network: Network, text: str) -> Link:
    reference, _, alias = text.partition(":")
    container = tx.containers.find(reference)
    image = tx.images.require(container.image_id)
    theirs = tx.endpoints.all("network_id = ? AND sandbox_id = ?", network.id, container.sandbox_id)
    names = dict.fromkeys((alias, container.spec.hostname or container.id[:12], container.name))
    ports = dict.fromkeys(exposed((*image.config.exposed_ports, *container.spec.exposed_ports)))
    addresses = tuple(each.address for other in theirs for each in other.addresses)
    return Link(tuple(names), addresses, tuple(ports), (*image.config.env, *container.spec.env))


def environment(name: str, links: Iterable[Link]) -> list[str]:
    """Return the variables that tell container `name` of its links (Docker's legacy links)."""
    pairs = []
    for link in links:
        prefix = link.names[0].upper().replace("-", "_").replace(".", "_")
        ports = sorted(link.ports, key=lambda port: (port.container_port, port.protocol))
        for index, port in enumerate(ports):
            where = f"{port.protocol}://{link.addresses[0]}:{port.container_port}"
            one = f"{prefix}_PORT_{port.container_port}_{port.protocol.upper()}"
            pairs += [f"{prefix}_PORT={where}"] if index == 0 else []
            pairs += [f"{one}={where}", f"{one}_ADDR={link.addresses[0]}", f"{one}_PORT={port.container_port}",
                      f"{one}_PROTO={port.protocol}"]  # fmt: skip
        pairs.append(f"{prefix}_NAME=/{name}/{link.names[0]}")
        pairs += [f"{prefix}_ENV_{pair}" for pair in link.env if pair.partition("=")[0] not in _NOT_PASSED_ON]
    return pairs
