"""Docker's flags of `network`, one after the other, as a user types them."""

from __future__ import annotations

import json
from ipaddress import ip_network

from conftest import Node


def network_of(node: Node, name: str) -> dict:
    return json.loads(node.out("network", "inspect", name))[0]


def names(node: Node, *filters: str) -> list[str]:
    flags = [part for each in filters for part in ("--filter", each)]
    return node.out("network", "ls", *flags, "--format", "{{.Name}}").split()


def test_configurations(node: Node, image: str) -> None:
    mtu = ("-o", "com.docker.network.driver.mtu=1400")
    node.cli("network", "create", "--config-only", "--ipv6", "--subnet", "10.8.0.0/24", *mtu, "--label", "a=b", "conf")
    assert network_of(node, "conf")["spec"]["config_only"]
    assert "nsbr" not in node.host.sh("ip -br link | grep -v $(ip -br link | grep -o 'nsbr-[0-9a-f]*' | head -1)")
    node.cli("network", "create", "--config-from", "conf", "--label", "c=d", "app")
    assert node.out("network", "create", "--config-from", "conf", "--label", "c=d", "app")  # again: the same
    app = network_of(node, "app")
    assert (app["labels"], app["status"]["mtu"]) == ({"a": "b", "c": "d"}, 1400)
    assert app["status"]["ipam"][0]["subnet"] == "10.8.0.0/24"
    assert app["spec"]["enable_ipv6"]
    node.cli("run", "-d", "--name", "c", "--network", "app", image)
    for command, named in (
        (("network", "create", "--config-from", "conf", "--internal", "x"), "spec.internal"),
        (("network", "create", "--config-from", "conf", "--subnet", "10.9.0.0/24", "x"), "spec.pools"),
        (("network", "create", "--config-from", "app", "x"), "spec.config_from"),
        (("network", "create", "--config-from", "conf", "x"), "10.8.0.0/24 of network app"),
        (("network", "rm", "conf"), "is the configuration of app"),
        (("run", "-d", "--network", "conf", image), "--config-from conf"),
        (("network", "create", "--config-only", "-d", "bridge", "x"), "spec.driver"),
    ):
        refused = node.cli(*command, check=False)
        assert (refused.returncode > 0, named in refused.stderr) == (True, True), (command, refused.stderr)
    node.host.netns("a")
    refused = node.cli("network", "connect", "--netns", "/run/netns/a", "conf", check=False)
    assert "only holds a configuration" in refused.stderr
    assert "conf" not in node.out("network", "prune", "--dry-run")
    assert node.out("system", "check") == "kernel and store agree"
    node.cli("rm", "-f", "c")
    node.cli("network", "rm", "app", "conf")


def test_create_flags(node: Node) -> None:
    for flag, named in (("--ingress", "--ingress"), ("--scope=swarm", "swarm"), ("--ipam-opt=a=b", "ipam_options")):
        refused = node.cli("network", "create", flag, "x", check=False)
        assert (refused.returncode > 0, named in refused.stderr) == (True, True)
    node.cli("network", "create", "--attachable", "--scope", "local", "--internal=false", "--ipv6=true", "one")
    assert network_of(node, "one")["spec"]["enable_ipv6"]
    assert not network_of(node, "one")["spec"]["internal"]
    node.cli("network", "create", "--ipv4=false", "--ipv6", "six")
    node.cli("network", "create", "-o", "com.docker.network.enable_ipv6=true", "--ipv4", "both")
    assert [":" in pool["subnet"] for pool in network_of(node, "six")["status"]["ipam"]] == [True]
    assert [":" in pool["subnet"] for pool in network_of(node, "both")["status"]["ipam"]] == [False, True]
    # A subnet of which only the size is given comes out of the pools, and each is another.
    sizes = ("--subnet", "0.0.0.0/26", "--subnet", "0.0.0.0/26", "--subnet", "::/80")
    node.cli("network", "create", "--ipv6", *sizes, "small")
    subnets = [ip_network(pool["subnet"]) for pool in network_of(node, "small")["status"]["ipam"]]
    assert [subnet.prefixlen for subnet in subnets] == [26, 26, 80]
    assert subnets[0].is_private
    assert not subnets[0].overlaps(subnets[1])
    assert node.out("network", "create", "--ipv6", *sizes, "small")  # again: the same
    # Docker's second names.
    assert node.out("network", "list", "-q") == node.out("network", "ls", "--quiet=true")
    node.cli("network", "remove", "small")


def test_list_and_prune_filters(node: Node, image: str) -> None:
    node.cli("network", "create", "--label", "tier=web", "app")
    node.cli("network", "create", "--label", "tier=web", "--label", "x", "app2")
    node.cli("network", "create", "my-app")
    node.cli("run", "-d", "--network", "app", image)
    assert names(node, "name=app") == ["app", "app2", "my-app"]
    assert names(node, "name=^app$") == ["app"]
    assert names(node, "name=^app") == ["app", "app2"]
    assert names(node, "name=app$") == ["app", "my-app"]
    assert names(node, f"id={network_of(node, 'app2')['id'][:12]}") == ["app2"]
    assert names(node, "label=tier=web", "label=x") == ["app2"]
    assert names(node, "driver=host") == ["host"]
    assert names(node, "driver=host", "driver=null") == ["host", "none"]
    assert names(node, "scope=local") == ["app", "app2", "bridge", "host", "my-app", "none"]
    assert names(node, "scope=swarm") == []
    assert names(node, "type=builtin") == ["bridge", "host", "none"]
    assert names(node, "type=custom", "dangling=true") == ["app2", "my-app"]
    assert names(node, "dangling=false") == ["app", "bridge", "host", "none"]
    assert "unknown" not in node.cli("network", "ls", "--filter", "colour=red", check=False).stdout
    assert node.out("network", "prune", "-f", "--filter", "until=1h") == ""
    assert node.out("network", "prune", "--dry-run", "--filter", "label!=x") == "my-app"
    assert node.out("network", "prune", "-f", "--filter", "label=tier=web").splitlines()[0] == "app2"
    assert names(node, "type=custom") == ["app", "my-app"]


def test_connect_flags_and_verbose(node: Node, image: str) -> None:
    node.cli("network", "create", "--ipv6", "--subnet", "10.8.0.0/24", "app")
    node.cli("network", "create", "--ipv6", "back")
    node.host.netns("a")
    endpoint = "com.docker.network.endpoint."
    node.cli("network", "connect", "--netns", "/run/netns/a", "--name", "a", "--driver-opt", f"{endpoint}ifname=lan0",
             "--driver-opt", f"{endpoint}macaddress=02:00:00:00:00:07", "--driver-opt",
             f"{endpoint}sysctls=net.ipv4.conf.IFNAME.log_martians=1,net.ipv6.conf.IFNAME.hop_limit=33",
             "--link-local-ip", "169.254.7.7", "--link-local-ip", "fe80::7", "app")  # fmt: skip
    shown = json.loads(node.host.sh("ip -n a -j addr show lan0"))[0]
    assert shown["address"] == "02:00:00:00:00:07"
    assert {"169.254.7.7", "fe80::7", "10.8.0.2"} <= {each["local"] for each in shown["addr_info"]}
    assert node.host.sh("ip netns exec a cat /proc/sys/net/ipv6/conf/lan0/hop_limit").strip() == "33"
    # They work beside the guard against spoofing, and no name leads to them.
    node.cli("run", "-d", "--name", "b", "--network", "name=app,link-local-ip=169.254.7.8", image)
    assert node.cli("exec", "b", "ping", "-c1", "-W2", "169.254.7.7").returncode == 0
    assert node.host.run("ip", "netns", "exec", "a", "ping", "-6", "-c1", "-W2", "fe80::7%lan0").returncode == 0
    assert "169.254" not in node.out("exec", "b", "nslookup", "a")
    node.host.netns("d")
    taken = node.cli(
        "network", "connect", "--netns", "/run/netns/d", "--link-local-ip", "169.254.7.7", "app", check=False
    )
    assert "taken by endpoint a" in taken.stderr
    # The default route goes by priority, negative ones too, and not by who came last.
    node.cli("network", "connect", "--gw-priority", "-1", "back", "b")
    assert "10.8.0.1 dev eth0" in node.out("exec", "b", "ip", "route", "show", "default")
    node.cli("network", "disconnect", "back", "b")
    node.cli("network", "connect", "--gw-priority", "5", "back", "b")
    assert "eth1" in node.out("exec", "b", "ip", "route", "show", "default")
    found = json.loads(node.out("network", "inspect", "-v", "app"))[0]
    assert sorted(each["name"] for each in found["endpoints"]) == ["a", "b"]
    assert "endpoints" not in network_of(node, "app")
    assert node.out("system", "check") == "kernel and store agree"
    node.cli("network", "disconnect", "-f", "app", "nosuch")
    node.cli("network", "disconnect", "--netns", "/run/netns/a", "app")
    assert node.cli("network", "disconnect", "--netns", "/run/netns/a", "app", check=False).returncode == 1
    node.cli("network", "disconnect", "-f", "--netns", "/run/netns/a", "app")


def test_the_way_out_of_others(node: Node) -> None:
    """A default route that is not ours stays, of either family, unless the priority says otherwise; ours comes back."""
    host = node.host
    node.cli("network", "create", "--subnet", "10.8.0.0/24", "--ipv6", "--subnet", "fd08::/64", "app")
    theirs = {
        "a": "default via 10.99.0.1 dev lan",
        "b": "default via fd99::1 dev lan",
        "c": "10.55.0.0/16 via 10.99.0.1 dev lan",
    }
    for name, route in theirs.items():
        host.netns(name)
        host.sh(f"ip -n {name} link set lo up; ip -n {name} link add lan type veth peer name other; ip -n {name} link set lan up;"
                f"ip -n {name} link set other up; ip -n {name} addr add 10.99.0.2/24 dev lan; ip -n {name} addr add fd99::2/64 dev lan nodad;"
                f"ip -n {name} {'-6' if 'fd99' in route else ''} route add {route}")  # fmt: skip
    for name, flags, ours in (("a", (), False), ("b", (), False), ("c", (), True), ("a", ("--gw-priority", "1"), True)):
        node.cli("network", "connect", *flags, "--netns", f"/run/netns/{name}", "app")
        routes = host.sh(f"ip -n {name} route; ip -n {name} -6 route")
        assert ("default via 10.8.0.1 dev eth0" in routes) == ("default via fd08::1 dev eth0" in routes) == ours, (
            name,
            routes,
        )
        assert (theirs[name] in routes) or flags, (name, routes)
        assert host.run("ip", "netns", "exec", name, "ping", "-c1", "-W2", "10.8.0.1").returncode == 0
        node.cli("network", "disconnect", "--netns", f"/run/netns/{name}", "app")
    assert node.out("system", "check") == "kernel and store agree"
