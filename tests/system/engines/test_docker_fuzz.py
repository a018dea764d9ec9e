"""The Docker plugin's socket, as nobody should call it: every answer is JSON with a reason, and nothing is left."""

from __future__ import annotations

import asyncio
import io
import json
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import Host, Node

NETWORKS = ["a" * 64, "b" * 64]
ENDPOINTS = [f"{number:064x}" for number in range(50)]
JUNK: list[Any] = [
    None,
    7,
    -1,
    "",
    "x" * 300,
    "../..",
    "\0",
    "10.9.0.999/24",
    [],
    [7],
    {"Address": 7},
    {"com.docker.network.portmap": 7},
    1e300,
]


def data(subnet: str) -> list[dict[str, Any]]:
    return [{"AddressSpace": "netstore", "Pool": subnet, "Gateway": "", "AuxAddresses": None}]


def network(index: int) -> dict[str, Any]:
    return {"NetworkID": NETWORKS[index], "IPv4Data": data(f"10.9{index}.0.0/24"), "IPv6Data": None, "Options": None}


def endpoint(name: str, index: int = 0, port: int = 0) -> dict[str, Any]:
    ports = [{"Proto": 6, "Port": 80, "HostIP": "", "HostPort": port, "HostPortEnd": port}]
    options = {"com.docker.network.portmap": ports} if port else {}
    return {"NetworkID": NETWORKS[index], "EndpointID": name, "Interface": {}, "Options": options}


@dataclass
class Caller:
    """dockerd, or somebody who is not."""

    session: aiohttp.ClientSession

    async def raw(self, method: str, body: bytes) -> tuple[int, dict[str, Any]]:
        async with self.session.post(f"http://plugin/{method}", data=io.BytesIO(body)) as answer:
            assert answer.content_type == "application/vnd.docker.plugins.v1.1+json"
            return answer.status, json.loads(await answer.read())

    async def ok(self, method: str, **call: Any) -> dict[str, Any]:
        status, answer = await self.raw(method, json.dumps(call).encode())
        assert (status, answer.get("Err")) == (200, None), (method, call)
        return answer


@pytest.fixture
def plugin(host: Host, place: Path) -> Iterator[Node]:
    """A node that serves the plugin where this process finds it."""
    node = Node(host, place)
    (place / "docker.toml").write_text(
        f'[adapters.docker]\nsocket = "{place}/docker.sock"\n[resolver]\nmanage = false\n'
    )
    node.start("--config", str(place / "docker.toml"))
    yield node
    node.stop()


@asynccontextmanager
async def calling(plugin: Node) -> AsyncIterator[Caller]:
    connector = aiohttp.UnixConnector(path=str(plugin.place / "docker.sock"), limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        yield Caller(session)


def nothing_left(plugin: Node) -> None:
    assert "defect" not in plugin.log()
    assert plugin.out("endpoint", "ls", "-q") == plugin.out("volume", "ls", "-q") == ""
    assert plugin.out("system", "check") == "kernel and store agree"
    assert "nsv-" not in plugin.host.sh("ip -o link")
    assert "nsp-" not in plugin.host.sh("ip -o link")


BAD = [
    ("NetworkDriver.CreateNetwork", b'{"NetworkID": "', 400, "truncated"),
    ("NetworkDriver.CreateNetwork", b"", 400, "truncated"),
    ("NetworkDriver.CreateNetwork", b'{"a": ' + b"[" * 100_000, 400, "recursion"),
    (
        "NetworkDriver.CreateNetwork",
        json.dumps(network(0) | {"IPv4Data": data("10.9.0.1/24")}).encode(),
        200,
        "Pool: '10.9",
    ),
    ("NetworkDriver.Join", b'{"NetworkID": 7, "EndpointID": ""}', 400, "$.NetworkID"),
    ("NetworkDriver.Join", json.dumps(endpoint("../" * 22)).encode(), 400, "$.EndpointID"),
    ("NetworkDriver.Join", json.dumps(endpoint(ENDPOINTS[0])).encode(), 200, "no such network"),
    ("NetworkDriver.Nothing", b"{}", 404, "Not Found"),
    ("VolumeDriver.Create", b" " * (10 << 20), 413, "longer than 1 MiB"),
    ("VolumeDriver.Create", b'{"Name": "a/b"}', 200, "volume: 'a/b'"),
    ("VolumeDriver.Create", b'{"Name": "v", "Opts": {"size": "x"}}', 200, "spec.options[size]"),
    ("VolumeDriver.Get", b'{"Name": "v"}', 200, "no such volume: v"),
    ("IpamDriver.RequestPool", b'{"Pool": "10.9.0.1/24"}', 200, "did you mean 10.9.0.0/24"),
    ("IpamDriver.RequestAddress", b'{"PoolID": ""}', 200, "a subnet that was offered"),
    ("IpamDriver.RequestAddress", b'{"PoolID": "10.9.0.0/24"}', 200, "no network of netstore has the subnet"),
]
CALLS = ("NetworkDriver.CreateNetwork", "NetworkDriver.DeleteNetwork", "NetworkDriver.CreateEndpoint", "NetworkDriver.Join",
         "NetworkDriver.EndpointOperInfo", "NetworkDriver.Leave", "NetworkDriver.ProgramExternalConnectivity",
         "NetworkDriver.RevokeExternalConnectivity", "NetworkDriver.DeleteEndpoint", "NetworkDriver.DiscoverNew",
         "IpamDriver.RequestPool", "IpamDriver.ReleasePool", "IpamDriver.RequestAddress", "IpamDriver.ReleaseAddress",
         "VolumeDriver.Create", "VolumeDriver.Mount", "VolumeDriver.Unmount", "VolumeDriver.Path", "VolumeDriver.Remove",
         "VolumeDriver.List")  # fmt: skip


async def test_bad_calls(plugin: Node) -> None:
    """What cannot be read is an HTTP error, what is refused is Err, and both say what was wrong."""
    async with calling(plugin) as caller:
        for method, body, status, reason in BAD:
            found, answer = await caller.raw(method, body)
            assert found == status, (method, answer)
            assert reason in answer["Err"], (method, answer)
    nothing_left(plugin)


def some_call(chance: random.Random) -> tuple[str, bytes]:
    """Return a call that dockerd might make, now or at another time; every third one is spoilt."""
    method = chance.choice(CALLS)
    call = network(chance.randrange(2)) if "Network" in method.split(".")[1] else endpoint(
        chance.choice(ENDPOINTS[:4]), chance.randrange(2), chance.choice((0, 8080, 8081)))  # fmt: skip
    if method.startswith("Ipam"):
        call = {"PoolID": f"10.9{chance.randrange(3)}.0.0/24", "Pool": "", "SubPool": "", "V6": chance.random() < 0.5}
    if method.startswith("Volume"):
        call = {
            "Name": chance.choice("vw"),
            "ID": chance.choice("12"),
            "Opts": chance.choice((None, {"driver": "local"})),
        }
    if chance.random() < 0.2:
        call[chance.choice(list(call))] = chance.choice(JUNK)
    body = json.dumps(call).encode()
    return method, body[: chance.randrange(len(body))] if chance.random() < 0.1 else body


async def test_any_call_in_any_order(plugin: Node) -> None:
    """Calls of two networks, four endpoints, two volumes, spoilt, repeated and reordered, ten at a time."""
    chance = random.Random(8)
    async with calling(plugin) as caller:
        for _ in range(60):
            calls = [some_call(chance) for _ in range(10)]
            for (method, body), (status, answer) in zip(
                calls, await asyncio.gather(*(caller.raw(*each) for each in calls)), strict=True
            ):
                assert status in (200, 400), (method, body, answer)
                assert status == 200 or answer["Err"], (method, body, answer)
        for name in NETWORKS:  # with the endpoints that are left
            await caller.ok("NetworkDriver.DeleteNetwork", NetworkID=name)
        for name in "vw":
            await caller.ok("VolumeDriver.Remove", Name=name)
    nothing_left(plugin)


async def test_a_name_is_not_the_beginning_of_another_volumes_id(plugin: Node) -> None:
    """dockerd asks by names alone: `docker volume rm db` must not find a volume whose id begins with db."""
    plugin.cli("volume", "create", "data")
    (volume,) = json.loads(plugin.out("volume", "inspect", "data"))
    async with calling(plugin) as caller:
        for name in (volume["id"][:2], volume["id"]):
            for method in ("Get", "Path", "Mount"):
                status, answer = await caller.raw(f"VolumeDriver.{method}", json.dumps({"Name": name}).encode())
                assert (status, answer["Err"][:14]) == (200, "no such volume"), (method, answer)
            await caller.ok("VolumeDriver.Unmount", Name=name)
            await caller.ok("VolumeDriver.Remove", Name=name)
        assert plugin.out("volume", "ls", "-q") == "data"
        await caller.ok("VolumeDriver.Create", Name=volume["id"][:2])
        assert (await caller.ok("VolumeDriver.Get", Name=volume["id"][:2]))["Volume"]["Name"] == volume["id"][:2]
        for name in ("data", volume["id"][:2]):
            await caller.ok("VolumeDriver.Remove", Name=name)
    nothing_left(plugin)


async def test_a_thousand_at_once_and_a_kill(plugin: Node) -> None:
    """Twenty dockerds ask the same of 50 endpoints at once; netstored is killed, and asked again."""
    async with calling(plugin) as caller:
        await caller.ok("NetworkDriver.CreateNetwork", **network(0))
        calls = [caller.ok("NetworkDriver.CreateEndpoint", **endpoint(name)) for name in ENDPOINTS for _ in range(20)]
        made = await asyncio.gather(*calls)
        assert len({each["Interface"]["Address"] for each in made}) == len(ENDPOINTS)
        offered = await asyncio.gather(*(caller.ok("IpamDriver.RequestPool") for _ in range(20)))
        assert len({each["PoolID"] for each in offered}) == 20
        removals = [
            caller.raw("NetworkDriver.DeleteEndpoint", json.dumps(endpoint(name)).encode()) for name in ENDPOINTS[:25]
        ]
        removing = asyncio.gather(*removals, return_exceptions=True)
        await asyncio.sleep(0.05)
        plugin.kill()
        await removing
    plugin.start("--config", str(plugin.place / "docker.toml"))
    async with calling(plugin) as caller:
        await asyncio.gather(*(caller.ok("NetworkDriver.Join", **endpoint(name)) for name in ENDPOINTS[25:]))
        await asyncio.gather(*(caller.ok("NetworkDriver.DeleteEndpoint", **endpoint(name)) for name in ENDPOINTS))
        await caller.ok("NetworkDriver.DeleteNetwork", NetworkID=NETWORKS[0])
    nothing_left(plugin)
