"""A network's rows: whether one can be made, changed or removed; inside one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network

from netstore.drivers.base import Driver
from netstore.drivers.options import refuse_changes
from netstore.errors import Immutable, InUse, InvalidArgument
from netstore.model import Kind, Network, NetworkSpec, PolicyAction, Pool, Route
from netstore.networks import ipam
from netstore.networks.planning import refuse_other
from netstore.networks.policies import refuse_unpoliced
from netstore.store import Transaction

__all__ = [
    "NetworkChange", "changed", "check_families", "check_leases", "check_routes", "configuration", "configured",
    "counted", "delete", "denies", "refuse_in_use", "refuse_referred", "restore", "same",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkChange:
    """What is to change of a network; None keeps a field. Pools may be added, options changed where live."""

    labels: Mapping[str, str] | None = None
    options: Mapping[str, str] | None = None
    pools: Sequence[Pool] | None = None
    dns_servers: Sequence[str] | None = None
    routes: Sequence[Route] | None = None
    policy_ingress: PolicyAction | None = None
    policy_egress: PolicyAction | None = None


def denies(spec: NetworkSpec) -> bool:
    """Say whether a network lets nothing pass but what a policy allows."""
    return PolicyAction.DENY in (spec.policy_ingress, spec.policy_egress)


def changed(tx: Transaction, driver: Driver, network: Network, change: NetworkChange) -> Network:
    """Return a network with what is to change; pools that come are reserved."""
    spec = network.spec
    if change.dns_servers is not None:
        spec = replace(spec, dns_servers=tuple(change.dns_servers))
    if change.options is not None:
        refuse_changes(driver.options, spec.options, change.options)
        spec = replace(spec, options=dict(change.options))
    if change.routes is not None:
        spec = replace(spec, routes=tuple(change.routes))
    spec = replace(
        spec,
        policy_ingress=change.policy_ingress or spec.policy_ingress,
        policy_egress=change.policy_egress or spec.policy_egress,
    )
    if denies(spec):
        refuse_unpoliced(network, driver)
    labels = network.labels if change.labels is None else dict(change.labels)
    changed = replace(network, spec=spec, labels=labels)
    if change.pools is not None:
        changed = _add_pools(tx, driver, changed, change.pools)
    if change.routes is not None:
        check_routes(changed)
    return changed


def _add_pools(tx: Transaction, driver: Driver, network: Network, asked: Sequence[Pool]) -> Network:
    """Add the pools that a network does not have yet.

    Raises:
        Immutable: one that it has is missing, or differs.
    """
    wanted = [ipam.validate_pool(pool, i, gateway=driver.chooses_gateway) for i, pool in enumerate(asked)]
    for index, pool in enumerate(wanted):
        if not ipam.is_chosen(pool):
            raise InvalidArgument(f"spec.ipam[{index}].subnet", pool.subnet, "a subnet that is named in full")
    for pool in network.pools:
        if pool not in wanted:
            raise Immutable(f"spec.ipam: subnet {pool.subnet}", "further subnets")
    added = [pool for pool in wanted if pool not in network.pools]
    spec = replace(network.spec, pools=(*network.spec.pools, *added))
    check_families(spec)
    for pool in added:
        ipam.reserve_pool(tx, network, pool)
    pools = sorted([*network.pools, *added], key=lambda pool: ":" in pool.subnet)
    return replace(network, spec=spec, pools=tuple(pools))


def restore(tx: Transaction, network: Network) -> None:
    """Undo an update: the row as it was, and no pool besides its own."""
    kept = {pool.subnet for pool in network.pools}
    present = tx.networks.require(network.id)
    for pool in present.pools:
        if pool.subnet not in kept:
            ipam.release_pool(tx, network, pool)
    tx.networks.update(network)


def configuration(tx: Transaction, name: str) -> Network:
    """Return the network of a configuration that another is to be made from."""
    row = tx.row("SELECT id FROM networks WHERE name = ?", name)
    found = tx.networks.require(row[0]) if row else None
    if found is None or not found.spec.config_only:
        raise InvalidArgument("spec.config_from", name, "the name of a network that was made with config_only")
    return found


def configured(asked: NetworkSpec, config: Network) -> NetworkSpec:
    """Return a spec that has everything but the driver of a configuration."""
    merged = replace(config.spec, driver=asked.driver, config_only=False, config_from=asked.config_from)
    for name in asked.__dataclass_fields__:
        given, default = getattr(asked, name), getattr(NetworkSpec(), name)
        if name not in ("driver", "config_from") and given != default:
            raise InvalidArgument(f"spec.{name}", given, f"nothing beside config_from: it is that of {config.name}")
    return merged


def refuse_referred(tx: Transaction, network: Network) -> None:
    """Refuse to remove a configuration that networks were made from."""
    found = tx.networks.all("json_extract(body, '$.spec.config_from') = ?", network.name)
    if network.spec.config_only and found:
        names = ", ".join(each.name for each in found[:10])
        raise InUse(
            f"network {network.name} is the configuration of {names}", hint="remove those first", networks=names
        )


def check_families(spec: NetworkSpec) -> None:
    """Check that the subnets are of families that the network has."""
    if not spec.enable_ipv4 and not spec.enable_ipv6:
        raise InvalidArgument("spec.enable_ipv4", False, "true, or enable_ipv6 true: a network has one of them")
    for index, pool in enumerate(spec.pools):
        if spec.ipam_driver != "default" and pool.subnet:
            accepted = f"nothing with the IPAM driver {spec.ipam_driver}"
            raise InvalidArgument(f"spec.ipam[{index}].subnet", pool.subnet, accepted)
        enabled = spec.enable_ipv6 if ":" in pool.subnet else spec.enable_ipv4
        if pool.subnet and not enabled:
            name = "enable_ipv6" if ":" in pool.subnet else "enable_ipv4"
            raise InvalidArgument(f"spec.ipam[{index}].subnet", pool.subnet, f"a network with {name} for it")


def check_leases(spec: NetworkSpec, driver: Driver) -> None:
    """Check that a network whose addresses a DHCP server lends can have them."""
    if spec.ipam_driver != "dhcp" or spec.config_only:
        return
    if not driver.takes_leases:
        raise InvalidArgument("spec.ipam_driver", "dhcp", "default or null; dhcp with the drivers macvlan and ipvlan")
    if spec.enable_ipv6 or not spec.enable_ipv4:
        raise InvalidArgument("spec.enable_ipv6", spec.enable_ipv6, "false with the IPAM driver dhcp, which is IPv4's")
    if spec.routes:
        raise InvalidArgument("spec.routes", spec.routes[0].destination, "none with the IPAM driver dhcp")


def check_routes(network: Network) -> None:
    """Check that the gateways of the routes are the network's own neighbours."""
    subnets = [ip_network(pool.subnet) for pool in network.pools]
    for index, route in enumerate(network.spec.routes):
        if not any(ip_address(route.gateway) in subnet for subnet in subnets):
            accepted = f"an address inside {', '.join(map(str, subnets))}"
            raise InvalidArgument(f"spec.routes[{index}].gateway", route.gateway, accepted)


def same(present: Network, asked: Network) -> Network:
    """Return the network of a name, where it is what was asked for.

    Raises:
        AlreadyExists: it differs.
    """
    refuse_other(Kind.NETWORK, asked, present)
    return present


def delete(tx: Transaction, network: Network) -> None:
    """Remove a network and its policies, and say so."""
    for policy in tx.policies.all("network_id = ?", network.id):
        tx.event(Kind.POLICY, "remove", policy.id, policy.name, network=network.name)
    tx.event(Kind.NETWORK, "remove", network.id, network.name)
    tx.networks.delete(network.id)


def refuse_in_use(tx: Transaction, network: Network) -> None:
    """Refuse to remove a network that something is on.

    Raises:
        InUse: endpoints or services.
    """
    endpoints = tx.endpoints.all("network_id = ?", network.id)
    if endpoints:
        names = ", ".join(endpoint.name or endpoint.id[:12] for endpoint in endpoints[:10])
        raise InUse(
            f"network {network.name} has {len(endpoints)} endpoint(s): {names}",
            hint="disconnect them, or remove their containers, first", endpoints=names,
        )  # fmt: skip
    if services := [service.name for service in tx.services.all("network_id = ?", network.id)]:
        raise InUse(
            f"network {network.name} has {len(services)} service(s): {', '.join(services[:10])}",
            hint="remove them first (`netstore service rm`)", services=", ".join(services[:10]),
        )  # fmt: skip


def counted(tx: Transaction, network: Network) -> tuple[Network, int]:
    """Return a network and how many endpoints it has here."""
    return network, tx.endpoints.count("network_id = ?", network.id)
