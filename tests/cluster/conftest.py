"""Fixtures of a cluster, which all tests here share: it is mended and emptied after each."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Node, new_place

from cluster.lab import Etcd3, Underlay, empty, joined, make_certificates, start_etcd, start_node, stop_nodes


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ca.pem, and .pem and .key of `server` (etcd's members) and `node`."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="package")
def members(certificates: Path) -> Iterator[Etcd3]:
    """Three members of etcd with mutual TLS."""
    with new_place() as place:
        underlay = Underlay(place)
        started = start_etcd(underlay, certificates)
        yield started
        started.close()
        underlay.close()


@pytest.fixture
def etcd3(members: Etcd3) -> Iterator[Etcd3]:
    """Three members of etcd, one of which leads; what a test kills and cuts is mended after it."""
    yield members
    members.mend()


@pytest.fixture(scope="package")
def cluster(members: Etcd3) -> Iterator[list[Node]]:
    """Three nodes of one cluster, n1 to n3, on machines 1 to 3 of the underlay."""
    with ThreadPoolExecutor(3) as pool:
        nodes = list(pool.map(lambda number: start_node(members, number), (1, 2, 3)))
    yield nodes
    stop_nodes(nodes)


@pytest.fixture
def nodes3(etcd3: Etcd3, cluster: list[Node]) -> Iterator[list[Node]]:
    """Three nodes that are up and empty; what a test leaves and kills is put right after it."""
    joined(cluster)
    yield cluster
    etcd3.mend()
    empty(cluster)
