"""The address allocator under any sequence of operations: never two holders, never a leak, reused as late as possible."""

from __future__ import annotations

import sqlite3
from ipaddress import ip_address, ip_network

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from netstore.errors import AddressTaken, Exhausted
from netstore.model import Endpoint, EndpointSpec, Kind, Network, NetworkSpec, Pool, Sandbox
from netstore.networks import ipam
from netstore.store import Transaction
from netstore.store.schema import MIGRATIONS

SUBNETS = ("10.1.0.0/28", "10.1.1.0/29", "fd00:1::/124")


class Allocator(RuleBasedStateMachine):
    """One network of two IPv4 subnets and one of IPv6, and a model of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        connection = sqlite3.connect(":memory:", isolation_level=None)
        connection.execute("PRAGMA foreign_keys = ON")
        for script in MIGRATIONS:
            connection.executescript(script)
        self.connection, self.tx = connection, Transaction(connection)
        self.made = 0
        self.held: dict[str, tuple[str, ...]] = {}
        self.cursors: dict[str, object] = {}

    @initialize(range_=st.sampled_from(["", "10.1.0.8/29"]), auxiliary=st.sampled_from([{}, {"router": "10.1.0.3"}]))
    def make_network(self, range_: str, auxiliary: dict[str, str]) -> None:
        pools = [Pool(subnet=SUBNETS[0], ip_range=range_, aux_addresses=auxiliary), *map(_pool, SUBNETS[1:])]
        resolved = tuple(ipam.validate_pool(pool, index) for index, pool in enumerate(pools))
        self.reserved = {address for pool in resolved for address in (pool.gateway, *pool.aux_addresses.values())}
        self.network = Network(id=self._id(), name="n", spec=NetworkSpec(), pools=resolved, revision=1)
        self.tx.networks.insert(self.network)
        for pool in resolved:
            ipam.reserve_pool(self.tx, self.network, pool)
        self.dynamic = {
            str(each) for pool in resolved for each in ip_network(pool.ip_range or pool.subnet)
            if str(each) not in self.reserved and _usable(pool.subnet, each)
        }  # fmt: skip

    def _id(self) -> str:
        """Return an id that is the same when hypothesis plays the same steps again."""
        self.made += 1
        return f"{self.made:064x}"

    def _taken(self) -> set[str]:
        return {address for addresses in self.held.values() for address in addresses}

    def _attach(self, spec: EndpointSpec) -> tuple[str, ...]:
        """Do what an attach does to the store, in a savepoint as the store would."""
        self.connection.execute("SAVEPOINT request")
        try:
            endpoint_id, sandbox = self._id(), Sandbox(id=self._id(), path=f"/{self.made}")
            self.tx.sandboxes.insert(sandbox)
            given = ipam.allocate(self.tx, self.network, endpoint_id, spec)
            revision = self.tx.event(Kind.ENDPOINT, "connect", endpoint_id, "")
            self.tx.endpoints.insert(
                Endpoint(
                    id=endpoint_id, network_id=self.network.id, sandbox_id=sandbox.id, spec=spec, revision=revision
                )
            )
        except (AddressTaken, Exhausted):
            self.connection.execute("ROLLBACK TO request")
            raise
        finally:
            self.connection.execute("RELEASE request")
        self.held[endpoint_id] = tuple(each.address for each in given)
        return self.held[endpoint_id]

    @rule()
    def attach(self) -> None:
        expected = [self._next(version) for version in (4, 6)]
        try:
            given = self._attach(EndpointSpec())
        except Exhausted:
            assert None in expected
            return
        assert given == tuple(expected)
        self._moved(given)

    def _next(self, version: int) -> str | None:
        """Return the first free address after the last one given, round and round, of the first subnet that has one."""
        for pool in self.network.pools:
            mine = sorted(ip_address(a) for a in self.dynamic if ip_address(a) in ip_network(pool.subnet))
            last = self.cursors.get(pool.subnet)
            turn = [a for a in mine if last is None or a > last] + [a for a in mine if last is not None and a <= last]
            free = [str(a) for a in turn if str(a) not in self._taken()]
            if free and ip_network(pool.subnet).version == version:
                return free[0]
        return None

    def _moved(self, given: tuple[str, ...]) -> None:
        for address in map(ip_address, given):
            pool = next(pool for pool in self.network.pools if address in ip_network(pool.subnet))
            self.cursors[pool.subnet] = address

    @rule(data=st.data())
    def attach_static(self, data: st.DataObject) -> None:
        subnet = ip_network(data.draw(st.sampled_from(SUBNETS)))
        address = data.draw(st.sampled_from([str(each) for each in subnet if _usable(str(subnet), each)]))
        field = "ipv6_address" if subnet.version == 6 else "ipv4_address"
        taken = address in self._taken() | self.reserved
        try:
            given = self._attach(EndpointSpec(**{field: address}))
        except AddressTaken:
            assert taken
        except Exhausted:
            pass  # the other family has none left
        else:
            assert not taken
            assert address in given
            self._moved(tuple(each for each in given if each != address))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        endpoint_id = data.draw(st.sampled_from(list(self.held)))
        self.tx.endpoints.delete(endpoint_id)
        del self.held[endpoint_id]

    @invariant()
    def rows_are_what_is_held(self) -> None:
        if not hasattr(self, "network"):
            return
        rows = self.tx.rows("SELECT address, endpoint_id FROM addresses")
        assert {str(ip_address(packed)) for packed, owner in rows if owner} == self._taken()
        assert {str(ip_address(packed)) for packed, owner in rows if not owner} == self.reserved
        assert len(rows) == len(self._taken()) + len(self.reserved)


def _pool(subnet: str) -> Pool:
    return Pool(subnet=subnet)


def _usable(subnet: str, address: object) -> bool:
    network = ip_network(subnet)
    return address != network.network_address and (network.version == 6 or address != network.broadcast_address)


TestAllocator = Allocator.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
