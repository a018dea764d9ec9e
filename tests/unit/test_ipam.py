"""Pools and addresses: chosen, reserved, exhausted."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstore.errors import AddressTaken, Exhausted, FailedPrecondition, InvalidArgument
from netstore.model import Endpoint, EndpointSpec, Kind, Network, NetworkSpec, Pool, Sandbox, new_id
from netstore.networks import ipam
from netstore.networks.ipam import HostRoute
from netstore.store import Store, Transaction


def add_network(tx: Transaction, subnet: str, **pool: str) -> Network:
    name = new_id()[:8]
    resolved = ipam.validate_pool(Pool(subnet=subnet, **pool), 0)
    network = Network(
        id=new_id(),
        name=name,
        spec=NetworkSpec(),
        pools=(resolved,),
        revision=tx.event(Kind.NETWORK, "create", name, name),
    )
    tx.networks.insert(network)
    ipam.reserve_pool(tx, network, resolved)
    return network


def add_endpoint(tx: Transaction, network: Network) -> str:
    sandbox = Sandbox(id=new_id(), path=f"/run/netns/{new_id()}")
    tx.sandboxes.insert(sandbox)
    endpoint = Endpoint(
        id=new_id(), network_id=network.id, sandbox_id=sandbox.id, spec=EndpointSpec(),
        revision=tx.event(Kind.ENDPOINT, "connect", "", ""),
    )  # fmt: skip
    tx.endpoints.insert(endpoint)
    return endpoint.id


@pytest.fixture
async def store(tmp_path: Path):
    store = Store(tmp_path / "netstore.db")
    yield store
    await store.close()


async def test_default_pools_are_dockers_and_avoid_routes(store: Store) -> None:
    routes = [HostRoute(IPv4Network("0.0.0.0/0"), "eth0"), HostRoute(IPv4Network("172.17.4.0/24"), "vpn0")]
    assert await store.write(lambda tx: ipam.choose_subnet(tx, routes)) == "172.18.0.0/16"


async def test_halves_count_as_default_routes(store: Store) -> None:
    routes = [HostRoute(IPv4Network("0.0.0.0/1"), "vpn0"), HostRoute(IPv4Network("128.0.0.0/1"), "vpn0")]
    assert await store.write(lambda tx: ipam.choose_subnet(tx, routes)) == "172.17.0.0/16"


async def test_thirty_one_pools_then_exhausted(store: Store) -> None:
    for _ in range(31):
        await store.write(lambda tx: add_network(tx, ipam.choose_subnet(tx, [])))
    with pytest.raises(Exhausted, match="no default IPv4 address pool"):
        await store.write(lambda tx: ipam.choose_subnet(tx, []))


@pytest.mark.parametrize("other", ["10.1.0.0/16", "10.1.4.0/24", "10.0.0.0/8"])
async def test_overlap_names_the_other(store: Store, other: str) -> None:
    network = await store.write(lambda tx: add_network(tx, "10.1.0.0/16"))
    with pytest.raises(FailedPrecondition, match=f"overlaps 10.1.0.0/16 of network {network.name}"):
        await store.write(lambda tx: add_network(tx, other))
    assert await store.read(lambda tx: tx.networks.count()) == 1


async def test_addresses_are_given_in_turn_and_run_out(store: Store) -> None:
    network = await store.write(lambda tx: add_network(tx, "10.1.0.0/29"))

    def take(tx: Transaction) -> tuple[str, str]:
        endpoint = add_endpoint(tx, network)
        return endpoint, ipam.allocate(tx, network, endpoint, EndpointSpec())[0].address

    taken = [await store.write(take) for _ in range(5)]
    assert [address for _, address in taken] == [f"10.1.0.{last}" for last in range(2, 7)]
    with pytest.raises(Exhausted, match="no free address"):
        await store.write(take)
    await store.write(lambda tx: tx.endpoints.delete(taken[1][0]))
    assert (await store.write(take))[1] == "10.1.0.3"


async def test_static_address_names_its_holder(store: Store) -> None:
    network = await store.write(lambda tx: add_network(tx, "10.1.0.0/24", gateway="10.1.0.9"))
    with pytest.raises(AddressTaken, match="gateway"):
        await store.write(
            lambda tx: ipam.allocate(tx, network, add_endpoint(tx, network), EndpointSpec(ipv4_address="10.1.0.9"))
        )
    with pytest.raises(InvalidArgument, match="ip"):
        await store.write(
            lambda tx: ipam.allocate(tx, network, add_endpoint(tx, network), EndpointSpec(ipv4_address="10.2.0.1"))
        )


@pytest.mark.parametrize(
    "pool",
    [
        Pool(subnet="10.0.0.1/24"), Pool(subnet="300.0.0.0/8"), Pool(subnet="10.0.0.0/31"), Pool(subnet="fe80::/64"),
        Pool(subnet="224.0.0.0/8"), Pool(subnet="10.0.0.0/24", gateway="10.0.1.1"), Pool(gateway="10.0.0.1"),
        Pool(subnet="10.0.0.0/24", gateway="10.0.0.0"), Pool(subnet="10.0.0.0/24", ip_range="10.1.0.0/25"),
        Pool(subnet="10.0.0.0/24", aux_addresses={"router": "10.9.0.1"}), Pool(ip_range="10.0.0.0/25"),
    ],
)  # fmt: skip
def test_bad_pools_name_the_field(pool: Pool) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ipam.validate_pool(pool, 3)
    assert caught.value.field.startswith("spec.ipam[3].")


@given(st.sets(st.integers(0, 40)), st.integers(0, 40))
def test_first_gap_is_the_first_gap(taken: set[int], start: int) -> None:
    free = [number for number in range(start, 41) if number not in taken]
    expected = free[0] if free else None
    assert ipam._first_gap(iter(sorted(n for n in taken if n >= start)), start, 40) == expected
