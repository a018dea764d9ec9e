"""Writes endpoints of a node that does not exist to etcd, or takes them away, as fast as etcd does it.

Arguments: put|delete, network, first, last + 1, the node's address, directory of certificates, etcd's endpoints.
"""

from __future__ import annotations

import asyncio
import sys

from netstore.model import Node, stable_mac
from netstore.networks.cluster.records import ALIVE, ENDPOINTS, NODES, EndpointRecord, encode
from netstore.store.etcd import Etcd, Op, delete, put

AT_ONCE = 100  # etcd's limit is 128 operations


def record(number: int, network: str, node: Node) -> EndpointRecord:
    return EndpointRecord(
        id=f"{number:064x}", network_id=network, node_id=node.id, vtep=node.address, name=f"c{number}",
        names=(f"c{number}",), mac=stable_mac(str(number)), addresses=(f"10.70.{number // 256}.{number % 256}",),
    )  # fmt: skip


async def main(verb: str, network: str, first: str, last: str, address: str, place: str, *endpoints: str) -> None:
    etcd = Etcd(endpoints, ca=f"{place}/ca.pem", cert=f"{place}/node.pem", key=f"{place}/node.key")
    node = Node(id="f" * 64, name="big", address=address, create_time=1.0)
    await etcd.transact([], [put(NODES + node.id, encode(node)), put(ALIVE + node.id, b"")])

    def op(number: int) -> Op:
        key = f"{ENDPOINTS}{network}/{number:064x}"
        return put(key, encode(record(number, network, node))) if verb == "put" else delete(key)

    for start in range(int(first), int(last), AT_ONCE):
        await etcd.transact([], [op(number) for number in range(start, min(start + AT_ONCE, int(last)))])
    await etcd.close()


asyncio.run(main(*sys.argv[1:]))
