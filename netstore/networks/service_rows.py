"""A service's rows: it, its addresses and its ports; inside one transaction."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from netstore.model import EndpointMode, EndpointSpec, Kind, Network, Service
from netstore.networks import ipam, ports
from netstore.networks.planning import refuse_other
from netstore.store import Transaction

__all__ = ["change", "delete", "insert", "restore", "take_up"]


def insert(tx: Transaction, service: Service, network: Network, request_id: str) -> tuple[Service, bool]:
    """Add a service with an address of its own, or return the one of the same name and spec (with False).

    Raises:
        AlreadyExists, AddressTaken, Exhausted: see the contract.
    """
    for made in tx.answered(request_id, "CreateService"):
        return tx.services.require(made), False
    for present in tx.services.all("name = ?", service.name):
        refuse_other(Kind.SERVICE, service, present)
        return present, False
    tx.networks.require(network.id)
    if service.spec.mode is EndpointMode.VIP:
        taken = ipam.allocate(tx, network, None, EndpointSpec())
        service = replace(service, addresses=tuple(each.address for each in taken))
    revision = tx.event(Kind.SERVICE, "create", service.id, service.name, network=network.name)
    service = replace(service, revision=revision)
    tx.services.insert(service)
    ports.claim_for_service(tx, service)
    tx.answer(request_id, "CreateService", [service.id])
    return service, True


def change(tx: Transaction, service: Service) -> None:
    """Replace a service's row.

    Raises:
        AddressTaken: a port that it gets has a holder.
    """
    tx.services.update(service)
    ports.claim_for_service(tx, service)


def delete(tx: Transaction, service: Service) -> None:
    """Remove a service with its addresses and ports."""
    tx.event(Kind.SERVICE, "remove", service.id, service.name)
    tx.services.delete(service.id)
    for address in service.addresses:
        tx.execute(
            "DELETE FROM addresses WHERE network_id = ? AND address = ? AND endpoint_id IS NULL",
            service.spec.network_id, ip_address(address).packed,
        )  # fmt: skip


def restore(tx: Transaction, service: Service) -> None:
    """Put back a service that was removed just now."""
    for address in service.addresses:
        tx.execute("INSERT INTO addresses VALUES (?, ?, NULL)", service.spec.network_id, ip_address(address).packed)
    tx.services.insert(service)
    ports.claim_for_service(tx, service)


def take_up(tx: Transaction, service: Service) -> None:
    """Make a service of the cluster what it is there; ports that others have on this node it does not get here.

    Raises:
        sqlite3.IntegrityError: a service of this node alone has its name; nothing was changed.
    """
    if present := tx.services.get(service.id):
        if present != service:
            tx.event(Kind.SERVICE, "update", service.id, service.name)
            tx.services.update(service)
    else:
        tx.services.insert(service)
        tx.event(Kind.SERVICE, "create", service.id, service.name)
        for address in service.addresses:
            # One that an endpoint here has meanwhile is settled by who claims it in etcd.
            packed = ip_address(address).packed
            tx.execute("INSERT OR IGNORE INTO addresses VALUES (?, ?, NULL)", service.spec.network_id, packed)
    for taken in ports.claim_for_service(tx, service, strict=False):
        tx.event(Kind.SERVICE, "port-taken", service.id, service.name, detail=taken)
