"""What leads to endpoints of other nodes: what the kernel is told is as the picture is when it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from netstore.model import Address, Network, NetworkSpec, Node, PortMapping, RemoteEndpoint, Scope
from netstore.networks.cluster import cache
from netstore.networks.cluster.dataplane import DataPlane
from netstore.networks.cluster.records import ENDPOINTS, EndpointRecord, encode
from netstore.networks.context import Context
from netstore.store import Store, Transaction
from netstore.store.etcd import KeyValue

NETWORK = Network(
    id="a" * 64, name="n", spec=NetworkSpec(driver="told"), vni=4096, interface="nsbr-a",
    host_addresses=(Address(address="10.0.0.1", prefix=24),),
)  # fmt: skip
RECORD = EndpointRecord(
    id="e" * 64, network_id=NETWORK.id, node_id="b" * 64, vtep="192.0.2.2", mac="02:00:00:00:00:05",
    addresses=("10.0.0.5",), name="web", ports=(PortMapping(container_port=80, host_port=48080, mesh=True),),
)  # fmt: skip
KEY = f"{ENDPOINTS}{NETWORK.id}/{RECORD.id}"


class Told:
    """A driver, and policies, that note what they are told."""

    scope = Scope.GLOBAL

    def __init__(self) -> None:
        self.added: list[RemoteEndpoint] = []

    def is_here(self, _: Network) -> bool:
        return True

    def apply_remote(self, _: Network, *, add: Any, remove: Any) -> None:
        self.added += add

    async def exchange_remotes(self, *_: Any) -> None:
        pass


async def test_ports_of_an_endpoint_that_went_meanwhile_are_not_published(tmp_path: Path) -> None:
    store, told = Store(tmp_path / "netstore.db"), Told()
    context = Context(store, {"told": told}, None, Path(), (), ())  # type: ignore[dict-item, arg-type]
    plane = DataPlane(context, "c" * 64, told, told)  # type: ignore[arg-type]
    picture = cache.Picture("c" * 64, lambda network: network)

    def fill(tx: Transaction) -> RemoteEndpoint:
        tx.networks.insert(NETWORK)
        tx.execute("INSERT INTO global_networks VALUES (?, ?)", NETWORK.id, NETWORK.vni)
        tx.nodes.insert(Node(id=RECORD.node_id, name="b", address=RECORD.vtep, up=True))
        return picture.apply(tx, [(True, KeyValue(KEY, encode(RECORD), 1))]).add[NETWORK.id][0]

    remote = await store.write(fill)
    await plane.publish([remote])
    assert told.added == [remote]
    await store.write(lambda tx: picture.apply(tx, [(False, KeyValue(KEY, b"", 2))]))
    await plane.publish([remote])  # as it was found before
    assert told.added == [remote]
    await store.close()
    context.close()
