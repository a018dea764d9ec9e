"""A cluster on one machine: machines on one underlay, three of them with etcd, three with netstored."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from conftest import Host, Node, wait_until

from netstore.api.v1 import endpoint_pb2, service_pb2
from netstore.client import BlockingClient as Client

UNDERLAY = "198.51.100"
_CERTIFICATES = Path(__file__).parents[2] / "scripts" / "certificates"
_ETCD_UP_SECONDS = 20.0
_DATA = "/run/netns/etcd-{}"
_MEMBERS = ",".join(f"e{i}=https://{UNDERLAY}.{21 + i}:2380" for i in range(3))


def make_certificates(place: Path) -> Path:
    """Fill a directory with certificates, and return it."""
    addresses = [f"{UNDERLAY}.{last}" for last in range(1, 31)]
    early = ["faketime", "-f", "-3d"] if shutil.which("faketime") else []  # for nodes whose clock is behind
    subprocess.run([*early, _CERTIFICATES, place, *addresses], check=True)
    return place


def _holder() -> subprocess.Popen[bytes]:
    holder = subprocess.Popen(["unshare", "-nm", "--propagation", "private", "sleep", "infinity"])
    own = os.readlink("/proc/self/ns/net")
    wait_until(lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != own, what="the machine's namespace")
    wait_until(lambda: Path(f"/proc/{holder.pid}/comm").read_text() == "sleep\n", what="the machine's holder")
    return holder


class Underlay:
    """The wire between machines: a bridge in a namespace of its own, which has the address .254."""

    def __init__(self, place: Path) -> None:
        self._holders = [_holder()]
        self.host = Host(self._holders[0].pid, place)
        self.place = place
        self.host.sh(f"ip link set lo up; ip link add wire type bridge; ip addr add {UNDERLAY}.254/24 dev wire;"
                     "ip link set wire up; sysctl -qw net.bridge.bridge-nf-call-iptables=0 || true")  # fmt: skip

    def machine(self, number: int) -> Host:
        """Add a machine, with the address .NUMBER on `eth0`; its port on the wire is `m<number>`."""
        holder = _holder()
        self._holders.append(holder)
        machine = Host(holder.pid, self.place)
        self.host.sh(f"ip link add m{number} master wire type veth peer name eth0 netns {holder.pid};"
                     f"ip link set m{number} up")  # fmt: skip
        machine.sh(f"ip link set lo up; ip addr add {UNDERLAY}.{number}/24 dev eth0; ip link set eth0 up;"
                   f"ip route add default via {UNDERLAY}.254; mkdir -p /run/netns; mount -t tmpfs netns /run/netns")  # fmt: skip
        return machine

    def cut(self, *numbers: int) -> None:
        """Cut machines off: what they send, and what is sent to them, is lost in silence."""
        ports = ", ".join(f'"m{number}"' for number in numbers)
        self.host.sh(
            "nft -f - <<'X'\nadd table bridge cut\nadd chain bridge cut forward { type filter hook forward priority 0; }\n"
            f"add rule bridge cut forward iifname {{ {ports} }} drop\n"
            f"add rule bridge cut forward oifname {{ {ports} }} drop\nX"
        )

    def cut_between(self, ones: list[int], others: list[int]) -> None:
        """Lose what one group sends the other; the way back stays."""
        ports, theirs = (", ".join(f'"m{number}"' for number in group) for group in (ones, others))
        self.host.sh(
            "nft -f - <<'X'\nadd table bridge cut\nadd chain bridge cut forward { type filter hook forward priority 0; }\n"
            f"add rule bridge cut forward iifname {{ {ports} }} oifname {{ {theirs} }} drop\nX"
        )

    def heal(self) -> None:
        """Undo every cut."""
        self.host.sh("nft delete table bridge cut 2>/dev/null || true")

    def close(self) -> None:
        for holder in self._holders:
            holder.kill()
        for holder in self._holders:
            holder.wait()


@dataclass
class Etcd3:
    """Members of etcd, three by default, on machines 21 to 23 of the underlay."""

    underlay: Underlay
    certificates: Path
    machines: list[Host]
    processes: list[subprocess.Popen[bytes] | None] = field(default_factory=lambda: [None, None, None])
    more: str = ""
    """Further lines of the nodes' section [cluster]."""

    @property
    def endpoints(self) -> list[str]:
        return [f"https://{UNDERLAY}.{21 + index}:2379" for index in range(len(self.processes))]

    def start(self, *indexes: int) -> None:
        """Start members."""
        for index in indexes:
            url = f"https://{UNDERLAY}.{21 + index}"
            tls = {"cert-file": "server.pem", "key-file": "server.key", "trusted-ca-file": "ca.pem"}
            flags = {
                "name": f"e{index}", "data-dir": _DATA.format(index), "listen-client-urls": f"{url}:2379",
                "advertise-client-urls": f"{url}:2379", "listen-peer-urls": f"{url}:2380",
                "initial-advertise-peer-urls": f"{url}:2380", "initial-cluster-state": "new",
                "initial-cluster": ",".join(_MEMBERS.split(",")[: len(self.processes)]),
                "heartbeat-interval": "100", "election-timeout": "700", "logger": "zap",
                **{key: str(self.certificates / name) for key, name in tls.items()},
                **{f"peer-{key}": str(self.certificates / name) for key, name in tls.items()},
            }  # fmt: skip
            command = ["etcd", "--client-cert-auth", "--peer-client-cert-auth"]
            command += [f"--{key}={value}" for key, value in flags.items()]
            with (self.underlay.place / f"etcd-{index}.log").open("ab") as log:
                self.processes[index] = subprocess.Popen(self.machines[index].command(*command), stdout=log, stderr=log)

    def kill(self, *indexes: int) -> None:
        """Kill members (SIGKILL)."""
        for index in indexes:
            process = self.processes[index]
            assert process
            process.kill()
            process.wait()
            self.processes[index] = None

    def save(self) -> None:
        """Take a backup, for `restore`."""
        self.ctl("snapshot", "save", str(self.underlay.place / "backup"), at=self.endpoints[:1])

    def forget(self) -> None:
        """Remove what the members, none of which runs, have on their disks."""
        for index, machine in enumerate(self.machines):
            machine.sh(f"rm -r {_DATA.format(index)}")

    def restore(self) -> None:
        """Make new members, whose history is the backup's, and start them: all were killed."""
        self.forget()
        for index, machine in enumerate(self.machines):
            machine.sh(f"ETCDCTL_API=3 etcdctl snapshot restore {self.underlay.place}/backup --name e{index} "
                       f"--data-dir {_DATA.format(index)} --initial-cluster {_MEMBERS} "
                       f"--initial-advertise-peer-urls https://{UNDERLAY}.{21 + index}:2380")  # fmt: skip
        self.start(0, 1, 2)

    def mend(self) -> None:
        """Heal every cut, start the members that do not run, and wait for one to lead."""
        self.underlay.heal()
        dead = [index for index, process in enumerate(self.processes) if process is None or process.poll() is not None]
        self.start(*dead)
        if dead:
            self.wait()

    def ctl(self, *args: str, check: bool = True, at: list[str] | None = None) -> str:
        """Run etcdctl on the wire, by default with all members."""
        files = {"cacert": "ca.pem", "cert": "node.pem", "key": "node.key"}
        flags = [f"--{key}={self.certificates / name}" for key, name in files.items()]
        command = ["env", "ETCDCTL_API=3", "etcdctl", f"--endpoints={','.join(at or self.endpoints)}", *flags, *args]
        return self.underlay.host.run(*command, check=check).stdout

    def leader(self) -> int:
        """Return the index of the member that leads."""
        found = json.loads(self.ctl("endpoint", "status", "-w", "json", "--command-timeout=2s", check=False) or "[]")
        for each in found:
            status = each["Status"]
            if status.get("leader") == status["header"]["member_id"]:
                return self.endpoints.index(each["Endpoint"])
        return -1

    def wait(self) -> None:
        """Wait for a member that leads."""
        wait_until(lambda: self.leader() >= 0, seconds=_ETCD_UP_SECONDS, what="etcd's leader")

    def config(self, number: int, name: str) -> str:
        """Return the section [cluster] of a node's configuration."""
        endpoints = ", ".join(f'"{each}"' for each in self.endpoints)
        return (
            f'[cluster]\nendpoints = [{endpoints}]\nca = "{self.certificates}/ca.pem"\n'
            f'cert = "{self.certificates}/node.pem"\nkey = "{self.certificates}/node.key"\n'
            f'advertise = "{UNDERLAY}.{number}"\nname = "{name}"\n{self.more}'
        )

    def worker(self, scenario: str) -> None:
        """Run a scenario of etcd_worker.py on the wire; pids of the members are given, so that it can kill them."""
        given = {
            "endpoints": self.endpoints, "certificates": str(self.certificates), "leader": self.leader(),
            "pids": [_etcd_pid(process) for process in self.processes],
        }  # fmt: skip
        worker = Path(__file__).with_name("etcd_worker.py")
        done = self.underlay.host.run(sys.executable, str(worker), scenario, json.dumps(given), check=False, timeout=50)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    def close(self) -> None:
        self.kill(*(index for index, process in enumerate(self.processes) if process))


def _etcd_pid(process: subprocess.Popen[bytes] | None) -> int:
    return process.pid if process else 0  # nsenter executes in place: the pid is etcd's


def start_etcd(underlay: Underlay, certificates: Path) -> Etcd3:
    """Start three members on machines of their own, and wait for one to lead."""
    members = Etcd3(underlay, certificates, [underlay.machine(21 + index) for index in range(3)])
    members.start(0, 1, 2)
    members.wait()
    return members


class ClusterNode(Node):
    """A node that also has the driver of plugin/, and more in its environment."""

    environment: Sequence[str] = ()

    def command(self, name: str, *flags: str) -> list[str]:
        plugin = f"PYTHONPATH={Path(__file__).with_name('plugin')}"
        return ["env", plugin, *self.environment, *super().command(name, *flags)]


def new_node(etcd: Etcd3, number: int, name: str = "", *, advertise: int = 0) -> Node:
    """Make a machine of the underlay with a configuration for netstored; by default its name is n<number>, and the
    address that it tells others is its own.
    """
    machine = etcd.underlay.machine(number)
    place = etcd.underlay.place / f"n{number}"
    place.mkdir(mode=0o711)
    node = ClusterNode(machine, place)
    section = etcd.config(advertise or number, name or f"n{number}")
    (place / "cluster.toml").write_text("[resolver]\nmanage = false\n" + section)
    return node


def start_node(etcd: Etcd3, number: int, name: str = "") -> Node:
    """Start netstored and its resolver on such a machine."""
    node = new_node(etcd, number, name)
    node.start_resolver()
    restart(node)
    return node


def restart(node: Node) -> None:
    """Start a node's daemon, again."""
    node.start("--config", str(node.place / "cluster.toml"))


@contextmanager
def pair_of_ipv6(etcd: Etcd3, nodes: list[Node], numbers: tuple[int, int], more: str = "") -> Iterator[list[Node]]:
    """Add two machines that tell others their IPv6 addresses, fd00:198::<number>; `more` is more of their [cluster].

    In the end the first of `nodes` removes them from the cluster.
    """
    pair = [new_node(etcd, number) for number in numbers]
    for number, node in zip(numbers, pair, strict=True):
        node.host.sh(f"ip -6 addr add fd00:198::{number}/64 dev eth0 nodad")
        file = node.place / "cluster.toml"
        six = f'advertise = "fd00:198::{number}"{more}'
        file.write_text(file.read_text().replace(f'advertise = "{UNDERLAY}.{number}"', six))
        node.start_resolver()
        restart(node)
    try:
        yield pair
    finally:
        stop_nodes(pair)
        for number in numbers:
            nodes[0].cli("node", "rm", "-f", f"n{number}")


def stop_nodes(nodes: list[Node]) -> None:
    """Remove the containers of nodes and stop their daemons."""
    for node in nodes:
        for process in (node.daemon, node.resolver):
            if process and process.poll() is None:
                process.send_signal(signal.SIGCONT)
        if node.daemon and node.daemon.poll() is None and (containers := node.out("ps", "-aq").split()):
            node.cli("rm", "-f", "-v", *containers)
    for node in nodes:
        node.stop()


def empty(nodes: list[Node]) -> None:
    """Let a cluster be as at its start: its daemons run, are up and have nothing; the kernel has nothing either."""
    for node in nodes:
        assert node.daemon
        if node.daemon.poll() is not None:
            restart(node)
    joined(nodes)
    for node in nodes:
        if containers := node.out("ps", "-aq").split():
            node.cli("rm", "-f", "-v", *containers)
        client = Client(node.address)
        for endpoint in client.endpoints.ListEndpoints(endpoint_pb2.ListEndpointsRequest()).endpoints:
            client.endpoints.DetachEndpoint(endpoint_pb2.DetachEndpointRequest(endpoint=endpoint.id))
        for service in client.services.ListServices(service_pb2.ListServicesRequest()).services:
            client.services.DeleteService(service_pb2.DeleteServiceRequest(service=service.id, allow_missing=True))
        client.channel.close()
        node.cli("node", "undrain", "self")
        node.host.sh(
            "for n in $(ip netns list | cut -d' ' -f1); do ip netns pids $n | xargs -r kill; ip netns del $n; done"
        )
    custom = ("network", "ls", "-q", "--filter", "type=custom")
    for node in nodes:
        for network in node.out(*custom).split():
            removal = ("network", "rm", "-f", network)  # refused until the other nodes' endpoints are known to be gone
            wait_until(lambda node=node, of=removal: not node.cli(*of, check=False).returncode, what="its removal")
    for node in nodes:
        wait_until(lambda node=node: not node.out(*custom), what="no networks")
        wait_until(lambda node=node: not node.cli("system", "check", check=False).returncode, what="a clean kernel")


def states(node: Node) -> dict[str, str]:
    """Return the names of all nodes, and how they are, as one sees it."""
    lines = node.out("node", "ls", "--format", "{{.Name}} {{.Status.State}}").splitlines()
    return dict(line.split() for line in lines)


def info(node: Node) -> dict[str, object]:
    """Return how a node stands with its cluster."""
    found = json.loads(node.out("system", "info", "--format", "json"))["cluster"]
    return {**found, "state": found["state"].removeprefix("CLUSTER_STATE_").lower()}


def joined(nodes: list[Node]) -> None:
    """Wait until every node sees every node."""
    for node in nodes:
        wait_until(lambda node=node: list(states(node).values()) == ["up"] * len(nodes), seconds=20, what="all nodes")


def known(nodes: list[Node], network: str) -> None:
    """Wait until every node knows a network."""
    for node in nodes:
        wait_until(lambda node=node: network in node.out("network", "ls"), what=f"network {network}")


def connect(node: Node, sandbox: str, network: str = "app", *flags: str) -> str:
    """Attach a new namespace and return its address."""
    path = node.host.netns(sandbox)
    node.cli("network", "connect", network, "--netns", path, "--name", sandbox, *flags)
    return address_of(node, sandbox)


def address_of(node: Node, sandbox: str) -> str:
    """Return the address of a namespace's eth0, "" where it has none."""
    return node.host.sh(f"ip -n {sandbox} -4 -o addr show dev eth0 | awk '{{print $4}}' | cut -d/ -f1").strip()


def resolves(node: Node, sandbox: str, name: str) -> str:
    """Return the IPv4 addresses of a name, asked for in a namespace."""
    done = node.host.run(
        "ip", "netns", "exec", sandbox, "dig", "+short", "+time=1", "+tries=1", "@127.0.0.11", "-q", name, check=False
    )
    return " ".join(sorted(re.findall(r"^[0-9.]+$", done.stdout, re.MULTILINE)))


def pings(node: Node, sandbox: str, address: str, *flags: str) -> bool:
    """Say whether an address answers, in a namespace, or ("") the machine's own."""
    where = ("ip", "netns", "exec", sandbox) if sandbox else ()
    return not node.host.run(*where, "ping", "-c1", "-W1", *flags, address, check=False).returncode


def reaches(node: Node, sandbox: str, address: str) -> None:
    """Wait until an address answers."""
    wait_until(lambda: pings(node, sandbox, address), what=f"{sandbox} to reach {address}")
