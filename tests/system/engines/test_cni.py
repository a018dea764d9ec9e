"""netstore-cni as runtimes call it: variables, a configuration on stdin, JSON on stdout (CNI specification 1.1.0)."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Host, Node, wait_until

from netstore.adapters.cni.messages import VERSIONS

PROGRAM = Path(__file__).parents[3] / "packaging/netstore-cni"
DUAL = {"driver": "bridge", "subnet": "10.77.0.0/24", "subnet6": "fd77::/64"}


@dataclass
class Cni:
    """A runtime: `call` runs the program in the host's namespaces."""

    node: Node

    def config(self, *, version: str = "1.1.0", **keys: Any) -> dict[str, Any]:
        base = {"cniVersion": version, "name": "pods", "type": "netstore-cni", "create": DUAL}
        return base | {"socket": f"{self.node.place}/run/cni.sock"} | keys

    def variables(self, command: str, container: str, **more: str) -> dict[str, str]:
        known = {"CNI_COMMAND": command, "CNI_CONTAINERID": container, "CNI_NETNS": f"/run/netns/{container}"}
        return known | {"CNI_IFNAME": "eth0", "CNI_PATH": "/usr/lib/cni"} | more

    def raw(self, body: str, variables: dict[str, str], program: Path = PROGRAM) -> tuple[int, Any]:
        pairs = [f"{name}={value}" for name, value in variables.items()]
        command = self.node.host.command("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *pairs, str(program))
        done = subprocess.run(command, input=body, capture_output=True, text=True, timeout=50)
        assert not done.stderr, done.stderr
        return done.returncode, json.loads(done.stdout) if done.stdout else None

    def call(self, command: str, container: str = "a", *, version: str = "1.1.0", **keys: Any) -> tuple[int, Any]:
        return self.raw(json.dumps(self.config(version=version, **keys)), self.variables(command, container))

    def ok(self, command: str, container: str = "a", **keys: Any) -> Any:
        status, answer = self.call(command, container, **keys)
        assert status == 0, answer
        return answer

    def fails(self, code: int, command: str, container: str = "a", **keys: Any) -> str:
        status, answer = self.call(command, container, **keys)
        assert (status, answer["code"]) == (1, code), answer
        assert answer["cniVersion"] == keys.get("version", "1.1.0")
        return f"{answer['msg']} {answer['details']}"

    def endpoints(self) -> list[Any]:
        lines = self.node.out("endpoint", "ls", "-q").split()
        return sorted(lines)


@pytest.fixture
def cni(node: Node) -> Cni:
    """A runtime with two namespaces, a and b."""
    for name in "ab":
        node.host.netns(name)
    return Cni(node)


def program_of(node: Node, name: str = "netstore-cni") -> Path:
    """Return the program with the node's sockets as its default: what is no JSON cannot name one."""
    program = node.place / name
    program.write_text(PROGRAM.read_text().replace("/run/netstore", f"{node.place}/run"))
    program.chmod(0o755)
    return program


def addresses(host: Host, name: str, interface: str = "eth0") -> set[str]:
    (link,) = json.loads(host.sh(f"ip -n {name} -j addr show dev {interface}"))
    return {f"{each['local']}/{each['prefixlen']}" for each in link["addr_info"] if each["scope"] == "global"}


@pytest.mark.parametrize("version", VERSIONS)
def test_life(cni: Cni, version: str) -> None:
    """ADD makes what its result says, in the configuration's version; DEL takes all of it away, however often."""
    host = cni.node.host
    added = cni.ok("ADD", version=version)
    assert added["cniVersion"] == version
    bridge, outer, inner = added["interfaces"]
    (link,) = json.loads(host.sh("ip -n a -j link show dev eth0"))
    assert (inner["name"], inner["sandbox"], inner["mac"]) == ("eth0", "/run/netns/a", link["address"])
    (there,) = json.loads(host.sh(f"ip -j link show dev {bridge['name']}"))
    assert there["address"] == bridge["mac"]
    host.sh(f"ip link show dev {outer['name']} | grep 'master {bridge['name']}'")
    assert {each["address"] for each in added["ips"]} == addresses(host, "a")
    assert [each["gateway"] for each in added["ips"]] == ["10.77.0.1", "fd77::1"]
    assert {each["interface"] for each in added["ips"]} == {2}
    assert [each.get("version") for each in added["ips"]] == (["4", "6"] if version == "0.4.0" else [None, None])
    assert inner.get("mtu") == (link["mtu"] if version == "1.1.0" else None)
    assert added["routes"] == [{"dst": "0.0.0.0/0", "gw": "10.77.0.1"}, {"dst": "::/0", "gw": "fd77::1"}]
    assert added["dns"] == {"nameservers": ["127.0.0.11"]}
    host.sh("ip netns exec a ping -c1 -W2 10.77.0.1 && ip netns exec a ping -c1 -W2 203.0.113.1")
    assert cni.ok("CHECK", version=version, prevResult=added) is None
    assert cni.ok("ADD", version=version) == added  # what was done already
    for _ in range(2):
        assert cni.ok("DEL", version=version, prevResult=added) is None
    assert cni.endpoints() == []
    assert host.sh(f"ip -o link show master {bridge['name']}; ip -n a -o link show | grep -v ' lo:' || true") == ""
    assert "101" in str(cni.call("CHECK", version=version, prevResult=added)[1])


def test_version_needs_no_daemon(cni: Cni) -> None:
    cni.node.stop()
    for body in ('{"cniVersion": "1.0.0"}', "{"):
        status, answer = cni.raw(body, {"CNI_COMMAND": "VERSION"})
        assert (status, answer["supportedVersions"]) == (0, list(VERSIONS))
        assert answer["cniVersion"] == ("1.1.0" if body == "{" else "1.0.0")


def test_capabilities(cni: Cni) -> None:
    """Ports are reachable, addresses, MAC, bandwidth, aliases and name servers are as asked."""
    host = cni.node.host
    runtime = {
        "portMappings": [
            {"hostPort": 8080, "containerPort": 80, "protocol": "TCP"},
            {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "203.0.113.1"},
            {"hostPort": 0, "containerPort": 9},
        ],
        "ips": ["10.77.0.50/24", "fd77::50/64"], "mac": "02:00:00:00:00:50",
        "bandwidth": {"ingressRate": 8_000_000, "ingressBurst": 80_000, "egressRate": 4_000_000, "egressBurst": 1},
        "aliases": ["web", "www"], "dns": {"servers": ["203.0.113.2"], "searches": ["svc.example"]},
    }  # fmt: skip
    added = cni.ok("ADD", runtimeConfig=runtime)
    assert addresses(host, "a") == {"10.77.0.50/24", "fd77::50/64"}
    assert added["interfaces"][2]["mac"] == "02:00:00:00:00:50"
    assert added["dns"] == {"nameservers": ["127.0.0.11"], "search": ["svc.example"]}
    (endpoint,) = cni.endpoints()
    shown = json.loads(cni.node.out("endpoint", "inspect", endpoint))[0]
    assert shown["spec"]["options"] == {
        "netstore.endpoint.bandwidth_in": "8000000", "netstore.endpoint.bandwidth_out": "4000000",
    }  # fmt: skip
    assert len(shown["status"]["ports"]) == 2
    cni.ok("ADD", "b", runtimeConfig={"aliases": {"pods": ["db"], "other": ["x"]}})
    server = subprocess.Popen(host.command("ip", "netns", "exec", "a", "busybox", "httpd", "-f", "-p", "80", "-h", "/"))
    try:
        wait_until(lambda: "200" in host.sh("ip netns exec b curl -sI 10.77.0.50/etc/hostname || true"), what="httpd")
        assert host.sh("ip netns exec neighbour curl -s 203.0.113.1:8080/etc/hostname") != ""
        assert host.sh("ip netns exec b dig +short @127.0.0.11 web").strip() == "10.77.0.50"
        assert host.sh("ip netns exec a dig +short @127.0.0.11 db").strip().startswith("10.77.0.")
    finally:
        server.kill()
        server.wait()
    cni.ok("DEL")
    cni.ok("DEL", "b")


def test_arguments(cni: Cni) -> None:
    """CNI_ARGS and args.cni: address, MAC, labels, the pod's name; capabilities come first."""
    variables = cni.variables(
        "ADD", "a", CNI_ARGS="IgnoreUnknown=1;K8S_POD_NAME=web-0;IP=10.77.0.9;MAC=02:00:00:00:00:09"
    )
    config = cni.config(args={"cni": {"labels": [{"key": "app", "value": "web"}], "ips": ["10.77.0.8/24"]}})
    status, added = cni.raw(json.dumps(config), variables)
    assert status == 0, added
    assert added["ips"][0]["address"] == "10.77.0.8/24"
    assert added["interfaces"][2]["mac"] == "02:00:00:00:00:09"
    shown = json.loads(cni.node.out("endpoint", "inspect", *cni.endpoints()))[0]
    assert shown["name"] == "web-0"
    assert shown["labels"] == {"app": "web", "cni.network": "pods", "cni.container-id": "a", "cni.ifname": "eth0"}
    cni.ok("DEL")


def test_collection(cni: Cni) -> None:
    """GC takes away what is of this configuration and not in the list, also when its namespace is gone."""
    cni.ok("ADD", "a")
    cni.ok("ADD", "b")
    cni.node.host.netns("c")
    cni.ok("ADD", "c", name="others", network="pods")
    kept = cni.endpoints()
    cni.ok("GC", **{"cni.dev/valid-attachments": [{"containerID": c, "ifname": "eth0"} for c in "ab"]})
    assert cni.endpoints() == kept
    cni.node.host.sh("ip netns del b")
    cni.ok("GC", **{"cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}]})
    assert len(cni.endpoints()) == 2
    cni.ok("GC", **{"cni.dev/valid-attachments": []})
    assert len(cni.endpoints()) == 1
    cni.ok("DEL", "c", name="others", network="pods")
    assert "valid-attachments" in cni.fails(7, "GC")
    cni.fails(1, "GC", version="1.0.0")


def test_check_sees_what_is_wrong(cni: Cni) -> None:
    added = cni.ok("ADD")
    wrong = added | {"ips": [{"address": "10.77.0.99/24"}]}
    assert "prevResult" in cni.fails(103, "CHECK", prevResult=wrong)
    cni.node.host.sh("ip -n a addr del 10.77.0.2/24 dev eth0")
    assert "10.77.0.2" in cni.fails(103, "CHECK", prevResult=added)
    cni.node.host.sh("ip -n a addr add 10.77.0.2/24 dev eth0")
    cni.ok("CHECK", prevResult=added)
    cni.node.host.sh("ip -n a link set eth0 name eth9")
    assert "eth0" in cni.fails(103, "CHECK", prevResult=added)
    cni.ok("DEL")


def test_chain(cni: Cni) -> None:
    """Plugins after it go on with its result: Debian's tuning and portmap, which publishes what netstore does not."""
    plugins = next((p for p in (Path(".peers/usr/lib/cni"), Path("/usr/lib/cni")) if (p / "tuning").exists()), None)
    if plugins is None:
        pytest.skip("no plugins to chain: scripts/peers containernetworking-plugins")
    host, options = cni.node.host, {"com.docker.network.bridge.gateway_mode_ipv4": "nat-unprotected"}
    added = cni.ok("ADD", version="1.0.0", create=DUAL | {"options": options})
    chain = {
        "tuning": {"sysctl": {"net.ipv4.conf.eth0.arp_filter": "1"}},
        "portmap": {"snat": True, "runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}},
    }  # fmt: skip

    def go_on(command: str, kind: str, result: Any) -> Any:
        after = {"cniVersion": "1.0.0", "name": "pods", "type": kind, "prevResult": result, **chain[kind]}
        status, answer = cni.raw(json.dumps(after), cni.variables(command, "a"), (plugins / kind).absolute())
        assert status == 0, answer
        return answer

    chained = go_on("ADD", "portmap", go_on("ADD", "tuning", added))
    assert chained["ips"] == added["ips"]
    assert host.sh("ip netns exec a sysctl -n net.ipv4.conf.eth0.arp_filter").strip() == "1"
    server = subprocess.Popen(host.command("ip", "netns", "exec", "a", "busybox", "httpd", "-f", "-p", "80", "-h", "/"))
    try:
        fetch = "ip netns exec neighbour curl -s -m2 203.0.113.1:8080/etc/hostname || true"
        wait_until(lambda: host.sh(fetch), what="the port that portmap publishes")
    finally:
        server.kill()
        server.wait()
    go_on("CHECK", "tuning", chained)  # portmap 1.1.1 fails its own wherever it has no rule for IPv6
    assert cni.ok("CHECK", version="1.0.0", prevResult=chained) is None
    assert "first" in cni.fails(7, "ADD", version="1.0.0", prevResult=chained)
    for kind in reversed(chain):
        go_on("DEL", kind, chained)
    cni.ok("DEL", version="1.0.0", prevResult=chained)
    assert cni.endpoints() == []


def test_status(cni: Cni) -> None:
    cni.ok("STATUS")
    assert "create" in cni.fails(50, "STATUS", create=None)
    cni.fails(1, "STATUS", version="1.0.0")
    cni.node.stop()
    cni.fails(50, "STATUS")
    for command in ("ADD", "DEL", "CHECK", "GC"):
        cni.fails(11, command)


def test_wrong_calls(cni: Cni) -> None:
    """Each wrong call is told with the specification's code, and leaves nothing."""
    good, program = json.dumps(cni.config()), program_of(cni.node)
    for body in ("", "{", good[:-1], "null", "[]", good.replace('"create"', '"create": 7, "x"'), "[" * 100_000):
        status, answer = cni.raw(body, cni.variables("ADD", "a"), program)
        assert status == 1, body[:80]
        assert answer["code"] in (6, 7), answer
    for name, value in (("CNI_CONTAINERID", ""), ("CNI_CONTAINERID", "../x"), ("CNI_IFNAME", "a/b"), ("CNI_IFNAME", "lo"),
                        ("CNI_NETNS", "/run/netns/none"), ("CNI_NETNS", "/etc/passwd"), ("CNI_NETNS", "/proc/self/ns/net"),
                        ("CNI_COMMAND", "MOVE"), ("CNI_ARGS", "nonsense")):  # fmt: skip
        status, answer = cni.raw(good, cni.variables("ADD", "a") | {name: value})
        assert (status, answer["code"]) == (1, 4), (name, value, answer)
        assert name in answer["msg"]
    assert cni.raw(good, {})[1]["code"] == 4
    cni.fails(1, "ADD", version="1.1.0", cniVersion="0.1.0")
    assert "create" in cni.fails(2, "ADD", ipam={"type": "host-local"})
    for keys in (
        {"name": ""}, {"name": "a/b"}, {"network": "no such"}, {"create": {"subnet": "10.0.0.0/99"}}, {"create": {"mtu": 1}},
        {"create": {"options": {"x": "y"}}}, {"runtimeConfig": {"mac": "nonsense"}}, {"runtimeConfig": {"ips": ["x"]}},
        {"runtimeConfig": {"ips": ["10.77.0.5/24", "10.77.0.6/24"]}}, {"runtimeConfig": {"ips": ["10.9.9.9/24"]}},
        {"runtimeConfig": {"portMappings": [{"hostPort": 70000, "containerPort": 80}]}},
        {"runtimeConfig": {"portMappings": [{"hostPort": 80, "containerPort": 80, "protocol": "icmp"}]}},
        {"runtimeConfig": {"portMappings": [{"hostPort": 80, "containerPort": 80, "hostIP": "x"}]}},
        {"runtimeConfig": {"bandwidth": {"ingressRate": 10}}}, {"runtimeConfig": {"bandwidth": {"ingressRate": -1}}},
        {"runtimeConfig": {"aliases": ["not a name"]}}, {"runtimeConfig": {"dns": {"servers": ["x"]}}},
        {"runtimeConfig": []}, {"args": {"cni": {"labels": [{}]}}},
    ):  # fmt: skip
        told = cni.fails(7, "ADD", **keys)
        assert len(told) < 1000, keys
    cni.fails(101, "ADD", create=None, network="missing")
    cni.ok("DEL", ipam={"type": "host-local"}, create=7, runtimeConfig=[])  # what ADD refused does not keep DEL from it
    assert "MiB" in cni.fails(6, "ADD", padding="x" * 10_000_000)
    assert cni.endpoints() == []


def test_somebody_elses(cni: Cni) -> None:
    """A namespace that is attached already is not taken over, and not let go."""
    cni.ok("ADD")
    told = cni.raw(json.dumps(cni.config()), cni.variables("ADD", "other", CNI_NETNS="/run/netns/a"))[1]
    assert told["code"] == 103
    cni.ok("DEL", "other")
    assert len(cni.endpoints()) == 1
    cni.fails(102, "ADD", runtimeConfig={"mac": "02:00:00:00:00:77"})
    cni.ok("DEL")


def test_many_at_once(cni: Cni) -> None:
    """Fifty containers at once, their network made by the first; then each added and deleted in a muddle."""
    names = [f"c{number}" for number in range(50)]
    cni.node.host.sh("".join(f"ip netns add {name};" for name in names))
    with ThreadPoolExecutor(16) as pool:
        added = list(pool.map(lambda name: cni.ok("ADD", name), names))
        assert len({each["ips"][0]["address"] for each in added}) == 50
        muddle = [(command, name) for name in names[:10] for command in ("DEL", "ADD", "CHECK", "DEL", "ADD")]
        list(pool.map(lambda call: cni.call(*call), muddle))
        list(pool.map(lambda name: cni.ok("DEL", name), names))
    assert cni.endpoints() == []


def spoken(cni: Cni, command: str, container: str) -> bytes:
    """Return a call as the program sends it."""
    pairs = (f"{name}={value}" for name, value in cni.variables(command, container).items())
    return "\0".join(pairs).encode() + b"\0\0" + json.dumps(cni.config()).encode()


async def storm(path: str, draw: Callable[[], bytes]) -> list[bytes]:
    """Call a thousand at once; some talk nonsense, break off, or go away. Returns what those who listen are told."""

    async def call(number: int) -> bytes:
        whole = draw()
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            if number % 5 == 0:
                writer.write(whole[: random.randrange(len(whole))])
            elif number % 5 == 1:
                head = whole.partition(b"\0\0")[0]
                writer.write(head + b"\0\0" + bytes(random.randrange(256) for _ in range(200)))
            else:
                writer.write(whole)
            writer.write_eof()
            return b"0" if number % 7 == 0 else await reader.read()
        finally:
            writer.close()

    random.seed(8)
    return await asyncio.gather(*map(call, range(1000)))


async def test_a_thousand_at_once(cni: Cni) -> None:
    """Each of a thousand callers who listens gets an answer that the specification knows."""

    def draw() -> bytes:
        return spoken(cni, random.choice(("ADD", "DEL", "CHECK", "GC", "MOVE")), random.choice("ab"))

    for told in await storm(f"{cni.node.place}/run/cni.sock", draw):
        status, printed = told[:1], told[1:]
        assert status in (b"0", b"1")
        answer = json.loads(printed) if printed else {}
        assert status == b"0" or answer["code"] in (4, 6, 7, 101), answer
    cni.ok("DEL", "a")
    cni.ok("DEL", "b")
    assert cni.endpoints() == []
    assert "defect" not in cni.node.log()


async def test_given_up(cni: Cni) -> None:
    """A runtime that gives up waiting for ADD, and calls DEL at once, leaves nothing: DEL comes after it."""
    path = f"{cni.node.place}/run/cni.sock"
    cni.ok("ADD", "b")  # makes the network
    for _ in range(10):
        _, abandoned = await asyncio.open_unix_connection(path)
        abandoned.write(spoken(cni, "ADD", "a"))
        abandoned.write_eof()
        reader, writer = await asyncio.open_unix_connection(path)
        abandoned.transport.abort()
        writer.write(spoken(cni, "DEL", "a"))
        writer.write_eof()
        assert await reader.read() == b"0"
        writer.close()
        assert len(cni.endpoints()) == 1
    cni.ok("DEL", "b")


def test_an_interface_of_that_name(cni: Cni) -> None:
    """Where the name is taken inside, the message says so, and nothing is left."""
    cni.node.host.sh("ip -n a link add eth0 type veth peer name x0")
    assert "eth0" in str(cni.call("ADD"))
    assert cni.endpoints() == []
    cni.ok("ADD", "b")
    cni.ok("DEL", "b")


def test_killed_in_between(cni: Cni) -> None:
    """The daemon is killed while containers come: each is told to come again, and then all is well."""
    names = [f"c{number}" for number in range(12)]
    cni.node.host.sh("".join(f"ip netns add {name};" for name in names))
    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(cni.call, "ADD", name) for name in names]
        wait_until(lambda: any(call.done() for call in calls), what="the first")
        cni.node.kill()
        answers = [call.result() for call in calls]
    assert {answer.get("code", 0) for _, answer in answers} <= {0, 11}
    cni.node.start()
    before = cni.endpoints()
    assert len(before) >= sum(status == 0 for status, _ in answers)
    for name in names:
        assert cni.ok("CHECK", name, prevResult=cni.ok("ADD", name)) is None
    for name in names:
        cni.ok("DEL", name)
    assert cni.endpoints() == []
    assert cni.node.out("system", "check") == "kernel and store agree"


def test_finished_at_the_start(cni: Cni) -> None:
    """An endpoint whose pair was made when the daemon was killed, and nothing inside, is whole once it is back."""
    added = cni.ok("ADD")
    cni.node.kill()
    cni.node.host.sh("ip -n a link set eth0 down; ip -n a addr flush dev eth0")
    cni.node.start()
    assert addresses(cni.node.host, "a") == {each["address"] for each in added["ips"]}
    cni.ok("CHECK", prevResult=added)
    cni.node.host.sh("ip netns exec a ping -c1 -W2 203.0.113.1")
    cni.ok("DEL")


def test_a_name_is_no_id(cni: Cni) -> None:
    """A configuration's name that begins another network's id means that network not."""
    other = cni.node.out("network", "create", "--subnet", "10.78.0.0/24", "other")
    name = cni.node.out("network", "inspect", "--format", "{{.Id}}", "other")[:6]
    assert other
    cni.fails(50, "STATUS", name=name, create=None)
    status, answer = cni.call("ADD", name=name, create=None)
    assert status == 1
    assert name in answer["msg"]
    assert cni.endpoints() == []
    cni.ok("ADD", name=name)
    assert addresses(cni.node.host, "a") == {"10.77.0.2/24", "fd77::2/64"}
    cni.ok("DEL", name=name)
