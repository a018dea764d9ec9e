"""Clients of the contract: netstore.client, Node.js, Ruby, and what needs no stubs at all (server reflection)."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from conftest import BIN, Node

from netstore.api.v1 import common_pb2, network_pb2, system_pb2
from netstore.client import AddressError, Client, Problem

CLIENTS = Path(__file__).parents[2] / "examples/clients"
PROGRAMS = {
    "python": [sys.executable, str(CLIENTS / "python/client.py")],
    "node": [shutil.which("node") or "node", str(CLIENTS / "node/client.js")],
    "ruby": [shutil.which("ruby") or "ruby", str(CLIENTS / "ruby/client.rb")],
}
MADE = {"python": CLIENTS, "node": CLIENTS / "node/node_modules", "ruby": CLIENTS / "ruby/lib"}


def test_examples_in_every_language(node: Node) -> None:
    """Each lists, creates, attaches, watches and removes, and says the same."""
    path = node.host.netns("engine")
    missing = [language for language in PROGRAMS if not MADE[language].exists()]
    for language in PROGRAMS.keys() - set(missing):
        name = f"of-{language}"
        done = subprocess.run(
            node.host.command(*PROGRAMS[language], node.address, name, path), capture_output=True, text=True, timeout=40
        )
        assert not done.returncode, done.stdout + done.stderr
        listed, created, attached, *events, removed = done.stdout.splitlines()
        assert listed == "networks: bridge host none"
        assert (created, removed) == (f"created {name}", f"removed {name}")
        assert attached.startswith("attached eth0 172."), attached
        assert events == ["event RESOURCE_KIND_NETWORK create", "event RESOURCE_KIND_ENDPOINT connect"]
        assert node.out("network", "ls", "-q", "--filter", f"name={name}") == ""
    if missing:
        pytest.skip(f"{', '.join(missing)}: scripts/clients could not install what the example needs")


def test_reflection(node: Node) -> None:
    """A generic client finds the services and calls them: here buf's, as grpcurl does."""
    curl = [
        str(BIN / "buf"),
        "curl",
        "--protocol",
        "grpc",
        "--http2-prior-knowledge",
        "--unix-socket",
        node.address.removeprefix("unix://"),
    ]
    url = "http://localhost/netstore.v1.NetworkService/ListNetworks"
    done = node.host.run(*curl, "-d", '{"filter": ["driver=bridge"]}', url)
    assert [each["name"] for each in json.loads(done.stdout)["networks"]] == ["bridge"]
    listed = node.host.run(*curl, "--list-methods", "http://localhost").stdout
    assert "netstore.v1.VolumeService/CreateVolume" in listed


def test_the_python_client(node: Node) -> None:
    """Pages are followed, errors say why, and events go on where they were while netstored was killed."""
    asyncio.run(_use(node))


async def _use(node: Node) -> None:
    async with Client(node.address) as client:
        for number in range(3):
            network = network_pb2.Network(name=f"n{number}")
            await client.networks.CreateNetwork(network_pb2.CreateNetworkRequest(network=network))
        request = network_pb2.ListNetworksRequest(page_size=2)
        names = [
            each.name async for each in client.pages(client.networks.ListNetworks, request, lambda page: page.networks)
        ]
        assert sorted(names) == ["bridge", "host", "n0", "n1", "n2", "none"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.networks.GetNetwork(network_pb2.GetNetworkRequest(network="nowhere"))
        problem = Problem.of(caught.value)
        assert (problem.code, problem.reason, problem.unreachable) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND", False)
        assert "nowhere" in problem.message
        assert problem.hint

        seen: asyncio.Queue[common_pb2.Event] = asyncio.Queue()
        begin = (await client.system.GetInfo(system_pb2.GetInfoRequest())).revision

        async def watch() -> None:
            async for event in client.events(revision=begin, filter=["kind=network", "action=remove"]):
                seen.put_nowait(event)

        watching = asyncio.create_task(watch())
        revisions = []
        for number in range(3):
            if number:
                await asyncio.to_thread(node.kill)
                await asyncio.to_thread(node.start)
            delete = network_pb2.DeleteNetworkRequest(network=f"n{number}")
            await client.networks.DeleteNetwork(delete, wait_for_ready=True)
            event = await asyncio.wait_for(seen.get(), 20)
            assert event.resource_name == f"n{number}"
            revisions.append(event.revision)
        assert revisions == sorted(set(revisions))
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


@pytest.mark.parametrize(
    ("address", "said"), [("http://x", "unix:///path or tcp://"), ("tcp://x:1", "mutual TLS alone")]
)
def test_an_address_that_cannot_be(address: str, said: str) -> None:
    with pytest.raises(AddressError, match=said):
        _ = Client(address).networks
