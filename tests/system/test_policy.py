"""Policies: real traffic between namespaces, both families, on one bridge and routed; live; counted; repaired."""

from __future__ import annotations

import json
import select
import subprocess
import threading
import time
from collections.abc import Callable

import pytest
from conftest import BIN, Node, wait_until
from google.protobuf.field_mask_pb2 import FieldMask
from policy_lab import Lab, app, elements, lab, rules

from netstore.api.v1 import endpoint_pb2, policy_pb2
from netstore.client import BlockingClient as Client

__all__ = ["lab"]  # a fixture


@pytest.mark.parametrize("family", ["4", "6"])
def test_same_bridge_by_label(lab: Lab, family: str) -> None:
    """Only web reaches db, at one port; replies come back; everything changes at once."""
    app(lab, "--policy-default", "deny")
    db, web = lab.address("db", family), lab.address("web", family)
    assert not lab.tcp("web", db, 5432)
    assert not lab.ping("web", db)
    lab.node.cli("policy", "create", "allow-web", "--network", "app", "--from", "label=tier=web",
                 "--to", "label=tier=db", "--port", "5432/tcp", "--port", "8000-8010/tcp")  # fmt: skip
    assert lab.tcp("web", db, 5432)
    assert lab.tcp("web", db, 8005)
    assert not lab.tcp("web", db, 6000)
    assert not lab.udp("web", db, 5432)
    assert not lab.tcp("other", db, 5432)
    assert not lab.tcp("db", web, 80)
    assert not lab.ping("web", db)
    # Ports and protocols of a policy change while it is in use.
    lab.node.cli("policy", "update", "--port", "6000/udp", "--port", "icmp", "allow-web")
    assert not lab.tcp("web", db, 5432)
    assert lab.udp("web", db, 6000)
    assert lab.udp("web", db, 6000, size=4000)  # in fragments
    assert not lab.udp("other", db, 6000, size=4000)
    assert lab.ping("web", db)
    assert not lab.ping("db", web)
    assert not lab.udp("web", db, 5432)
    # Labels change.
    other = lab.found["other"]["id"]
    lab.node.cli("endpoint", "update", "--label-add", "tier=web", other)
    assert lab.udp("other", db, 6000)
    lab.node.cli("endpoint", "update", "--label-rm", "tier", other)
    assert not lab.udp("other", db, 6000)
    lab.node.cli("policy", "rm", "allow-web")
    assert not lab.udp("web", db, 6000)
    lab.node.cli("network", "update", "--policy-default", "allow", "app")
    assert lab.tcp("web", db, 5432)
    assert lab.node.out("system", "check") == "kernel and store agree"


@pytest.mark.parametrize("family", ["4", "6"])
def test_a_denial_comes_first_and_replies_are_let_in(lab: Lab, family: str) -> None:
    """On a network that allows by default; flows that there are end when a denial comes, others go on."""
    app(lab)
    db, web = lab.address("db", family), lab.address("web", family)
    assert lab.tcp("web", db, 6000)
    lab.node.cli("policy", "create", "no", "--network", "app", "--to", "label=tier=db", "--action", "deny")
    assert not lab.tcp("web", db, 6000)
    assert not lab.ping("other", db)
    assert lab.tcp("db", web, 80)  # the replies go to db, and are none of what is denied
    assert lab.ping("db", web)
    talk = "import socket, sys, time\ns = socket.create_connection((sys.argv[1], 80)); s.settimeout(3)\n"
    talk += "s.recv(99); print('on', flush=True)\nfor line in sys.stdin: s.sendall(b'x'); print(s.recv(9), flush=True)"
    with subprocess.Popen(
        lab.node.host.command("ip", "netns", "exec", "other", "python3", "-uc", talk, web),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as open_flow:  # fmt: skip
        assert open_flow.stdin
        assert open_flow.stdout
        assert open_flow.stdout.readline() == "on\n"
        open_flow.stdin.write("1\n")
        open_flow.stdin.flush()
        assert open_flow.stdout.readline() == "b'x'\n"
        # Who began is forgotten with the tables, which come back by themselves; the flow goes on.
        lab.node.host.sh("nft flush ruleset")
        wait_until(lambda: "members" in lab.node.host.sh("nft list table bridge netstore || true"), what="repair")
        open_flow.stdin.write("2\n")
        open_flow.stdin.flush()
        assert open_flow.stdout.readline() == "b'x'\n"
        lab.node.cli("policy", "create", "web", "--network", "app", "--to", "label=tier=web", "--action", "deny")
        open_flow.stdin.write("3\n")
        open_flow.stdin.flush()
        assert "timed out" in open_flow.communicate(timeout=10)[1]


@pytest.mark.parametrize("netfilter", ["0", "1"])
def test_routed(lab: Lab, netfilter: str) -> None:
    """Published ports, other machines, other networks and the node itself; by CIDR, both ways; br_netfilter or not."""
    lab.node.host.sh(f"for f in iptables ip6tables; do echo {netfilter} > /proc/sys/net/bridge/bridge-nf-call-$f; done")
    lab.node.host.sh(
        "ip -6 addr add 2001:db8::1/64 dev uplink nodad; ip -n neighbour -6 addr add 2001:db8::2/64 dev eth0 nodad"
    )
    lab.node.cli("network", "create", "--ipv6", "app", "--policy-default", "deny")
    lab.attach("web", "app", "tier=web", publish="8080:80")
    lab.attach("peer", "app")
    lab.node.cli("network", "create", "--ipv6", "far")
    lab.attach("far", "far")
    lab.serve("web", 80)
    lab.serve("neighbour", 7000, 7001)
    lab.serve("", 9000)
    outside = [("203.0.113.1", "203.0.113.2"), ("2001:db8::1", "2001:db8::2")]
    for host, machine in outside:
        assert not lab.tcp("neighbour", host, 8080)
        assert not lab.tcp("far", host, 8080)
        assert not lab.tcp("peer", host, 8080)
        assert not lab.tcp("web", machine, 7000)
        assert not lab.tcp("web", host, 9000)
        assert not lab.ping("web", host)
    assert lab.tcp("", "127.0.0.1", 8080)  # the node itself is always let in
    assert lab.ping("", lab.address("web"))
    lab.node.cli("policy", "create", "in", "--network", "app", "--from", "cidr=203.0.113.0/25",
                 "--from", "cidr=2001:db8::/64", "--to", "label=tier=web", "--port", "80")  # fmt: skip
    for host, _ in outside:
        assert lab.tcp("neighbour", host, 8080)
        assert not lab.tcp("far", host, 8080)
        assert not lab.tcp("peer", host, 8080)
    lab.node.cli("policy", "create", "out", "--network", "app", "--from", "label=tier=web",
                 "--to", "cidr=203.0.113.2/32", "--to", "cidr=2001:db8::2/128", "--port", "7000/tcp")  # fmt: skip
    for _, machine in outside:
        assert lab.tcp("web", machine, 7000)
        assert not lab.tcp("web", machine, 7001)
        assert not lab.tcp("peer", machine, 7000)
    # By a published port, from an endpoint of the same network: its own address and labels count, not the bridge's.
    lab.node.cli("policy", "create", "peers", "--network", "app", "--from", "label=role=peer", "--to", "label=tier")
    assert not lab.tcp("peer", "203.0.113.1", 8080)
    lab.node.cli("endpoint", "update", "--label-add", "role=peer", lab.found["peer"]["id"])
    for host, _ in outside:
        assert lab.tcp("peer", host, 8080)
    lab.node.cli("policy", "create", "node", "--network", "app", "--to", "cidr=203.0.113.1/32", "--port", "9000/tcp")
    assert lab.tcp("web", "203.0.113.1", 9000)
    # One direction alone: what leaves is free again, what enters is not.
    lab.node.cli("network", "update", "--policy-default", "egress=allow", "app")
    assert lab.tcp("web", "203.0.113.2", 7001)
    assert not lab.tcp("far", "203.0.113.1", 8080)
    lab.node.cli("policy", "rm", "in")
    assert not lab.tcp("neighbour", "203.0.113.1", 8080)
    shown = json.loads(lab.node.out("network", "inspect", "app"))[0]["spec"]
    assert (shown["policy_ingress"], shown["policy_egress"]) == ("POLICY_ACTION_DENY", "POLICY_ACTION_ALLOW")


def test_containers_have_their_labels(node: Node, image: str, lab: Lab) -> None:
    node.cli("network", "create", "--policy-default", "deny", "app")
    node.cli(
        "policy", "create", "ok", "--network", "app", "--from", "label=tier=web,label=env", "--to", "label=tier=db"
    )
    node.cli("run", "-d", "--name", "web", "--network", "app", "--label", "tier=web", "--label", "env=x", image)
    node.cli("run", "-d", "--name", "half", "--network", "app", "--label", "tier=web", image)
    node.cli("run", "-d", "--name", "db", "--network", "app", "--label", "tier=db", image)
    ping = ("ping", "-c1", "-W1", "db")  # names are answered: netstore-resolver is in the sandbox
    assert node.cli("exec", "web", *ping).returncode == 0
    assert node.cli("exec", "half", *ping, check=False).returncode == 1
    # A container that is connected later, and one that is started again, have theirs too.
    node.cli("run", "-d", "--name", "late", "--label", "tier=web", "--label", "env=y", image)
    node.cli("network", "connect", "app", "late")
    assert node.cli("exec", "late", *ping).returncode == 0
    node.cli("stop", "-t", "0", "db")
    node.cli("start", "db")
    assert node.cli("exec", "web", *ping).returncode == 0
    status = json.loads(node.out("policy", "inspect", "ok"))[0]["status"]
    assert (status["source_endpoints"], status["destination_endpoints"]) == (2, 1)


def test_create_list_remove(lab: Lab) -> None:
    node = lab.node
    node.cli("network", "create", "app")
    create = ("policy", "create", "p", "--network", "app", "--from", "label=b", "--from", "label=a", "--port", "53/udp")
    made = node.out(*create)
    assert node.out(*create) == made
    other = node.cli("policy", "create", "p", "--network", "app", "--from", "label=b", check=False)
    assert other.returncode == 1
    assert "exists and differs: sources is a or b, asked for b, ports is 53/udp, asked for any" in other.stderr
    assert node.out("policy", "ls", "-q", "--no-trunc") == made
    assert node.out("inspect", "--format", "{{.ID}}", "p") == made
    assert node.out("policy", "ls").splitlines()[1].split()[1:] == [
        "p",
        "app",
        "allow",
        "a|b",
        "any",
        "53/udp",
        "0",
        "0B",
    ]
    assert node.out("policy", "ls", "--filter", "network=bridge", "-q") == ""
    assert node.out("policy", "ls", "--format", "{{.Name}} {{.Spec.Network}}") == "p app"
    node.cli("policy", "update", "--label-add", "team=x", "--action", "deny", "--from", "any", "p")
    spec = json.loads(node.out("policy", "inspect", "p"))[0]["spec"]
    assert (spec["action"], spec["sources"]) == ("POLICY_ACTION_DENY", [])
    assert node.cli("policy", "rm", "nosuch", check=False).returncode == 1
    assert node.out("policy", "rm", "-f", "nosuch", "p") == "nosuch\np"
    # A network takes its policies with it, and nothing is left.
    node.cli("policy", "create", "q", "--network", "app", "--action", "deny")
    node.cli("network", "rm", "app")
    assert node.out("policy", "ls", "-q") == ""
    assert "counter" not in node.host.sh("nft list ruleset")


def test_counters(lab: Lab) -> None:
    """Every packet counts once, whether br_netfilter shows bridged packets to the other table or not."""
    app(lab, "--policy-default", "deny")
    lab.node.cli("policy", "create", "icmp", "--network", "app", "--port", "icmp")
    lab.node.cli("policy", "create", "no", "--network", "app", "--port", "6000", "--action", "deny")
    for netfilter in ("0", "1"):
        lab.node.host.sh(f"echo {netfilter} > /proc/sys/net/bridge/bridge-nf-call-iptables")
        before = json.loads(lab.node.out("policy", "inspect", "icmp"))[0]["status"]
        lab.run("web", "ping", "-c3", "-i0.2", lab.address("db"))
        after = json.loads(lab.node.out("policy", "inspect", "icmp"))[0]["status"]
        assert int(after["packets"]) - int(before["packets"]) == 6
        assert int(after["bytes"]) - int(before["bytes"]) == 6 * 84
    assert not lab.tcp("web", lab.address("db"), 6000)
    assert int(json.loads(lab.node.out("policy", "inspect", "no"))[0]["status"]["packets"]) >= 1


def test_the_cost_of_an_endpoint_is_constant(lab: Lab) -> None:
    """For itself its MAC and address; with a policy one element more to be policed, and one a selector and address; never a
    rule.
    """
    lab.node.cli("network", "create", "app")
    costs = []
    for number in range(4):
        if number == 2:
            lab.node.cli("policy", "create", "p", "--network", "app", "--from", "label=a", "--to", "label=b")
        before, skeleton = elements(lab), rules(lab)
        lab.attach(f"n{number}", "app", "a=1")
        costs.append(len(elements(lab)) - len(before))
        assert rules(lab) == skeleton
    assert costs == [2, 2, 5, 5]
    lab.node.cli("policy", "rm", "p")
    assert not [each for each in elements(lab) if each.startswith(("members", "policed"))]


def test_flush_restart_and_leftovers(lab: Lab) -> None:
    app(lab, "--policy-default", "deny")
    lab.node.cli("policy", "create", "ok", "--network", "app", "--from", "label=tier=web", "--to", "label=tier=db")
    db, state = lab.address("db"), sorted(elements(lab))

    def holds() -> None:
        assert lab.tcp("web", db, 5432, seconds=2)
        assert not lab.tcp("other", db, 5432)
        assert sorted(elements(lab)) == state
        assert lab.node.out("system", "check") == "kernel and store agree"

    holds()
    lab.node.host.sh("nft flush ruleset")
    wait_until(lambda: lab.node.host.run("nft", "list", "map", "bridge", "netstore", "members", check=False).returncode
               == 0 and sorted(elements(lab)) == state, seconds=3, what="automatic repair")  # fmt: skip
    holds()
    lab.node.kill()
    lab.node.host.sh("nft flush ruleset")
    lab.node.start()
    holds()
    # While netstored is away somebody takes some of it, and adds what looks like ours.
    lab.node.kill()
    lab.node.host.sh(
        "nft flush map bridge netstore members; nft add chain inet netstore n_feed; nft add set bridge netstore ends_x_to"
        " '{ type ifname; }'; nft add element inet netstore policed '{ \"nsbr-no\" : jump n_feed }'"
    )
    lab.node.start()
    holds()
    assert "n_feed" not in lab.node.host.sh("nft list ruleset")
    assert "ends_x_to" not in lab.node.host.sh("nft list ruleset")


def test_policies_need_a_bridge_with_addresses(lab: Lab) -> None:
    refused = lab.node.cli("policy", "create", "p", "--network", "host", check=False)
    assert "use a bridge network" in refused.stderr
    lab.node.cli("network", "create", "--ipam-driver", "null", "bare")
    refused = lab.node.cli("policy", "create", "p", "--network", "bare", check=False)
    assert "has no addresses" in refused.stderr
    refused = lab.node.cli("network", "create", "--policy-default", "deny", "--ipam-driver", "null", "b2", check=False)
    assert "has no addresses" in refused.stderr


@pytest.mark.parametrize("family", ["4", "6"])
def test_log_of_drops(lab: Lab, family: str) -> None:
    """Who wanted what of whom, and what forbade it; on one bridge and routed; a flood does not flood the log."""
    app(lab, "--policy-default", "ingress=deny")
    db, other = lab.address("db", family), lab.address("other", family)
    ends = f"[{db}]:6000" if family == "6" else f"{db}:6000"
    lab.node.cli("policy", "create", "no", "--network", "app", "--to", "label=tier=db", "--action", "deny")
    watching = subprocess.Popen(
        lab.node.host.command(str(BIN / "netstore"), "-H", lab.node.address, "policy", "log", "-f", "--tail", "0"),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert watching.stdout
        wait_until(lambda: not lab.tcp("other", db, 6000) and select.select([watching.stdout], [], [], 0)[0])
        line = watching.stdout.readline()
        assert f"app policy no: tcp {f'[{other}]' if family == '6' else other}:" in line
        assert line.endswith(f" (other) -> {ends} (db)\n")
    finally:
        watching.kill()
        watching.communicate()
    assert not lab.ping("other", lab.address("web", family))
    assert not lab.udp("neighbour", "203.0.113.1", 9)  # none of ours
    lines = lab.node.out("policy", "log", "--filter", "name=web").splitlines()
    assert lines
    assert all(f" app default: icmp {other} (other) -> {lab.address('web', family)} (web)" in line for line in lines)
    shown = json.loads(lab.node.out("policy", "log", "--filter", "policy=no", "--format", "json").splitlines()[0])
    assert (shown["destination"]["name"], shown["destination"]["port"], shown["protocol"]) == ("db", 6000, "tcp")
    assert shown["destination"]["endpoint"] == lab.found["db"]["id"]
    flood = "import socket, sys; s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET, 2)\n"
    flood += "for _ in range(5000): s.sendto(b'x', (sys.argv[1], 6000))"
    lab.run("other", "python3", "-c", flood, db)
    assert int(json.loads(lab.node.out("policy", "inspect", "no"))[0]["status"]["packets"]) > 5000
    assert 10 < len(lab.node.out("policy", "log", "--tail", "1000", "--filter", "policy=no").splitlines()) < 300
    # It works on after a flush and after netstored was away.
    lab.node.host.sh("nft flush ruleset")
    lab.node.kill()
    lab.node.start()
    assert not lab.tcp("other", db, 6000)
    wait_until(lambda: lab.node.out("policy", "log"), what="a drop")


def test_policies_and_endpoints_that_come_and_go_at_once(lab: Lab, client: Client) -> None:
    """Attach, detach, relabel, create, update and remove side by side: in the end kernel and store agree."""
    lab.node.cli("network", "create", "app")
    names = [f"n{number}" for number in range(6)]
    for name in names:
        lab.node.host.netns(name)
    problems: list[str] = []
    end = time.monotonic() + 5

    def endpoints(name: str) -> None:
        spec = endpoint_pb2.EndpointSpec(network="app", name=name, sandbox={"netns_path": f"/run/netns/{name}"})
        while time.monotonic() < end:
            wanted = endpoint_pb2.Endpoint(labels={"a": "1"}, spec=spec)
            made = client.endpoints.AttachEndpoint(endpoint_pb2.AttachEndpointRequest(endpoint=wanted)).endpoint
            changed = endpoint_pb2.Endpoint(id=made.id, labels={"b": "1"})
            request = endpoint_pb2.UpdateEndpointRequest(endpoint=changed, update_mask=FieldMask(paths=["labels"]))
            client.endpoints.UpdateEndpoint(request)
            if name != names[0] or time.monotonic() < end:
                client.endpoints.DetachEndpoint(endpoint_pb2.DetachEndpointRequest(endpoint=made.id))

    def policies(name: str) -> None:
        spec = policy_pb2.PolicySpec(network="app", sources=[{"labels": ["a"]}], destinations=[{"labels": ["b"]}])
        while time.monotonic() < end:
            policy = policy_pb2.Policy(name=name, spec=spec)
            client.policies.CreatePolicy(policy_pb2.CreatePolicyRequest(policy=policy))
            policy.spec.ports.add(protocol=policy_pb2.POLICY_PROTOCOL_TCP)
            client.policies.UpdatePolicy(
                policy_pb2.UpdatePolicyRequest(policy=policy, update_mask=FieldMask(paths=["spec.ports"]))
            )
            if name != "p0" or time.monotonic() < end:
                client.policies.DeletePolicy(policy_pb2.DeletePolicyRequest(policy=name))

    def run(work: Callable[[str], None], name: str) -> None:
        try:
            work(name)
        except Exception as error:
            problems.append(f"{name}: {error}")

    threads = [threading.Thread(target=run, args=(endpoints, name)) for name in names]
    threads += [threading.Thread(target=run, args=(policies, name)) for name in ("p0", "p1")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    time.sleep(0.5)  # the repair that our own removals ask for
    assert lab.node.out("system", "check") == "kernel and store agree"
    assert "is there and should not be" not in lab.node.log()
    assert "is missing" not in lab.node.log()
