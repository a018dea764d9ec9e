"""Services on a bridge network: real connections, counted by who answers them."""

from __future__ import annotations

import json
from ipaddress import ip_address

from balanced import reached, serving, settles, status, virtual
from conftest import Node, wait_until


def attach(node: Node, name: str, *flags: str, network: str = "app") -> None:
    path = node.host.netns(name)
    node.cli("network", "connect", *flags, network, "--netns", path, "--name", name)


def nothing_left(node: Node, *addresses: str) -> None:
    left = node.host.sh("for s in 'set services' 'set services6' 'set service_ports' 'map slots' 'map slots6' 'map"
                        " port_slots'; do nft list ${s% *} inet netstore ${s#* }; done; ip -o addr show")  # fmt: skip
    assert "elements" not in left
    assert not [each for each in addresses if f" {each}/" in left]


def resolves(node: Node, netns: str, name: str, kind: str = "A") -> set[str]:
    return set(node.host.sh(f"ip netns exec {netns} dig +short +time=1 +tries=1 @127.0.0.11 -q {name} {kind}").split())


def test_virtual_address(node: Node) -> None:
    """Both families, TCP and UDP, from a neighbour, the endpoint itself and the host; daemon killed; nothing is left."""
    node.cli("network", "create", "--ipv6", "--subnet", "10.77.0.0/24", "--subnet", "fd00:77::/64", "app")
    for name in ("b1", "b2", "b3"):
        attach(node, name, "--label", "tier=web")
    attach(node, "c", "--label", "who=c")
    node.cli("service", "create", "web", "--network", "app", "--label", "tier=web")
    shown = json.loads(node.out("service", "inspect", "web"))[0]
    four, six = shown["status"]["addresses"]
    with serving(node, "b1", "b2", "b3") as servers:
        assert resolves(node, "c", "web") == {four}
        assert resolves(node, "c", "web.app", "AAAA") == {six}
        assert resolves(node, "c", "tasks.web") == {"10.77.0.2", "10.77.0.3", "10.77.0.4"}
        for address in (four, six):
            found = reached(node, "c", address, times=150)
            assert found.keys() == {"b1", "b2", "b3"}
            assert min(found.values()) > 20, found
            assert reached(node, "b1", address, times=60).keys() == {"b1", "b2", "b3"}, "itself among them"
            assert reached(node, "", address).keys() == {"b1", "b2", "b3"}, "from the host"
            assert reached(node, "c", address, times=60, kind="udp").keys() == {"b1", "b2", "b3"}
        node.host.sh(f"ip netns exec c ping -c1 -W1 {four}")
        node.cli("policy", "create", "no", "--network", "app", "--from", "label=who=c", "--to", "label=tier=web",
                 "--action", "deny")  # fmt: skip
        assert reached(node, "c", four, times=1) == {"": 1}, "policies see the endpoint behind the address"
        node.cli("policy", "rm", "no")
        node.kill()
        assert reached(node, "c", four).keys() == {"b1", "b2", "b3"}
        node.host.sh(f"ip addr del {four}/32 dev $(ip -o link | grep -o 'nsbr-[0-9a-f]*' | tail -1)")
        node.start()
        assert reached(node, "c", four).keys() == {"b1", "b2", "b3"}
        assert node.out("system", "check") == "kernel and store agree"
        # Endpoints come, go, and change their labels.
        node.cli("network", "disconnect", "app", "--netns", "/run/netns/b3")
        settles(node, "c", four, {"b1", "b2"})
        servers["b2"].kill()
        endpoint = node.out("endpoint", "ls", "-q", "--filter", "name=b2")
        node.cli("endpoint", "update", "--label-rm", "tier", endpoint)
        settles(node, "c", four, {"b1"})
        assert status(node, "web") == {"b1": True}
    node.cli("network", "disconnect", "app", "--netns", "/run/netns/b1")
    wait_until(lambda: status(node, "web") == {}, what="its last endpoint's end")
    attach(node, "b4", "--label", "tier=db")
    with serving(node, "b4"):
        assert reached(node, "c", four, times=1) == {"": 1}
        node.cli("service", "update", "web", "--label-rm", "tier=web", "--label-add", "tier=db")
        assert reached(node, "c", four).keys() == {"b4"}
    refused = node.cli("network", "rm", "app", check=False)
    assert "disconnect" in refused.stderr
    for name in ("c", "b2", "b4"):
        node.cli("network", "disconnect", "app", "--netns", f"/run/netns/{name}")
    assert "has 1 service(s): web" in node.cli("network", "rm", "app", check=False).stderr
    node.cli("service", "rm", "web")
    nothing_left(node, four, six)
    assert node.out("service", "ls", "-q") == ""
    node.cli("network", "rm", "app")


def test_names_in_turn(node: Node) -> None:
    node.cli("network", "create", "--subnet", "10.77.0.0/24", "app")
    for name in ("b1", "b2"):
        attach(node, name, "--label", "tier=web")
    node.cli("service", "create", "web", "--network", "app", "-l", "tier", "--endpoint-mode", "dnsrr")
    assert resolves(node, "b1", "web") == {"10.77.0.2", "10.77.0.3"}
    assert json.loads(node.out("service", "inspect", "web"))[0]["status"]["addresses"] == []


def test_health_and_published_ports(node: Node) -> None:
    """Endpoints come into the balance when they answer, and leave it when they do not."""
    node.cli("network", "create", "--subnet", "10.77.0.0/24", "app")
    for name in ("b1", "b2"):
        attach(node, name, "--label", "tier=web")
    node.cli("service", "create", "web", "--network", "app", "-l", "tier=web", "-p", "8080:80", "-p", "5353:80/udp",
             "--health", "http:80/", "--health-interval", "1s", "--health-timeout", "1s", "--health-retries", "2")  # fmt: skip
    assert status(node, "web") == {"b1": False, "b2": False}
    four = virtual(node, "web")
    assert reached(node, "b1", four, times=1) == {"": 1}
    with serving(node, "b1", "b2"):
        settles(node, "b1", four, {"b1", "b2"})
        for netns, address in (("neighbour", "203.0.113.1"), ("", "127.0.0.1"), ("b1", "203.0.113.1")):
            assert reached(node, netns, address, port=8080).keys() == {"b1", "b2"}, (netns, address)
        assert reached(node, "neighbour", "203.0.113.1", port=5353, kind="udp").keys() == {"b1", "b2"}
        assert node.host.sh("curl -s http://10.77.0.2/ill") == "b1"
        settles(node, "b1", four, {"b2"})
        assert status(node, "web") == {"b1": False, "b2": True}
        node.kill()
        node.start()
        assert status(node, "web") == {"b1": False, "b2": True}
        node.host.sh("nft flush ruleset")
        settles(node, "neighbour", "203.0.113.1", {"b2"}, port=8080)
        node.host.sh("curl -s http://10.77.0.2/ill")
        settles(node, "b1", four, {"b1", "b2"})
        taken = node.cli("network", "connect", "app", "--netns", node.host.netns("c"), "-p", "8080:80", check=False)
        assert "host port 0.0.0.0:8080/tcp is taken by service web" in taken.stderr
        taken = node.cli("service", "create", "two", "--network", "app", "-l", "tier", "-p", "8080:80", check=False)
        assert "host port 0.0.0.0:8080/tcp is taken by service web" in taken.stderr
        node.cli("service", "update", "web", "--publish-rm", "8080", "--publish-add", "8081:80")
        assert reached(node, "neighbour", "203.0.113.1", port=8080, times=1) == {"": 1}
        assert reached(node, "neighbour", "203.0.113.1", port=8081).keys() == {"b1", "b2"}
    settles(node, "b1", four, {""})
    node.cli("service", "rm", "web")
    nothing_left(node, four)


def test_flows_end_with_what_leads_to_them(node: Node) -> None:
    """Of a service that is removed, of an endpoint that leaves it, of a port that it has no more; others' go on."""

    def flows(text: str) -> int:
        return node.host.sh("cat /proc/net/nf_conntrack").count(text)

    node.cli("network", "create", "--ipv6", "--subnet", "10.77.0.0/24", "--subnet", "fd00:77::/64", "app")
    for name in ("b1", "b2", "client"):
        attach(node, name, *(("--label", "tier=web") if name != "client" else ()))
    node.cli("service", "create", "web", "--network", "app", "-l", "tier=web", "-p", "5353:80/udp")
    found = json.loads(node.out("service", "inspect", "web"))[0]["status"]["addresses"]
    four, six = sorted(found, key=lambda each: ":" in each)
    first = next(
        each for each in node.out("endpoint", "ls", "-q").split() if "b1" in node.out("endpoint", "inspect", each)
    )
    long = str(ip_address(six).exploded)
    with serving(node, "b1", "b2"):
        for address in (four, six):
            assert reached(node, "client", address, kind="udp", times=30).keys() == {"b1", "b2"}
        assert reached(node, "neighbour", "203.0.113.1", port=5353, kind="udp").keys() == {"b1", "b2"}
        assert reached(node, "", "10.77.0.2", kind="udp", times=1) == {"b1": 1}
        assert flows("src=10.77.0.2 ") > 1
        node.cli("endpoint", "update", first, "--label-rm", "tier")
        wait_until(lambda: flows("src=10.77.0.2 ") == 1, what="the end of its flows; the one to itself stays")
        assert flows("src=10.77.0.3 ") > 2
        node.cli("service", "update", "web", "--publish-rm", "5353/udp")
        assert flows("dport=5353 ") == 0
        assert flows(f"dst={four} ") > 0
        assert flows(f"dst={long} ") > 0
        node.cli("service", "rm", "web")
        assert flows(f"dst={four} ") == flows(f"dst={long} ") == 0
        assert flows("src=10.77.0.2 ") == 1
