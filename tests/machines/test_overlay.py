"""An overlay between two whole machines, over a wire that loses, delays, reorders and fragments; and one that loses power."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator

import pytest
from cluster.lab import Etcd3, Underlay, make_certificates, start_etcd
from conftest import wait_until

from machines.machine import Machine, machines


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    """Two machines in one cluster, whose etcd is on the wire; a container a on n1 and b on n2, on the network app."""
    with machines(tmp_path_factory.mktemp("m"), 2) as (underlay, [one, other]):
        etcd = populate(underlay, one, other)
        yield one, other
        etcd.close()


def populate(underlay: Underlay, one: Machine, other: Machine) -> Etcd3:
    certificates = underlay.place / "certificates"
    certificates.mkdir()
    etcd = start_etcd(underlay, make_certificates(certificates))
    for number, machine in ((1, one), (2, other)):
        config = etcd.config(number, machine.name).replace(str(certificates), "/etc/netstore")
        files = {name: (certificates / name).read_bytes() for name in ("ca.pem", "node.pem", "node.key")}
        files["cluster"] = config.encode()
        put = "".join(f"echo {base64.b64encode(data).decode()} | base64 -d > {name}\n" for name, data in files.items())
        machine.sh(
            f"cd /etc/netstore\n{put}cat cluster >> netstored.toml; chmod 600 node.key; systemctl restart netstored"
        )
    wait_until(lambda: states(one) == ["up", "up"], seconds=60, what="both nodes")
    one.sh("netstore network create -d overlay --subnet 10.90.0.0/16 app")
    one.sh(
        "head -c 3000000 /dev/urandom > /root/big; netstore run -d --name a --network app -v /root:/www bb httpd -f -h /www"
    )
    other.until("netstore network inspect app")
    other.sh("netstore run -d --name b --network app --restart always bb")
    other.until("netstore exec b ping -c1 -W1 a")
    return etcd


def states(machine: Machine) -> list[str]:
    nodes = json.loads(machine.run("netstore node ls --format json")[1] or "[]")
    return sorted(str(each["status"]["state"]).rpartition("_")[2].lower() for each in nodes)


def fetch(machine: Machine) -> str:
    """Fetch the large file from a; returns its sum, and that which it should have."""
    return machine.sh("netstore exec b wget -qO- http://a/big | md5sum | cut -d' ' -f1")


def test_names_and_a_large_file(two: tuple[Machine, Machine]) -> None:
    one, other = two
    assert one.sh("netstore exec a ping -c1 -W5 b >/dev/null; echo $?") == "0"
    assert fetch(other) == one.sh("md5sum < /root/big | cut -d' ' -f1")
    for machine in two:
        assert json.loads(machine.sh("netstore system check --format json")) == []


def test_a_wire_that_loses_delays_and_reorders(two: tuple[Machine, Machine]) -> None:
    one, other = two
    for machine in two:
        machine.sh("tc qdisc add dev eth0 root netem delay 20ms 10ms reorder 25% 50% loss 5%")
    try:
        assert fetch(other) == one.sh("md5sum < /root/big | cut -d' ' -f1")
        other.sh("netstore run -d --name c --network app bb")
        one.until("netstore exec a ping -c1 -W2 c")
        assert states(one) == ["up", "up"]
        other.sh("netstore rm -f c")
        assert "dropped 0," not in one.sh("tc -s qdisc show dev eth0")
    finally:
        for machine in two:
            machine.sh("tc qdisc del dev eth0 root")


def test_a_wire_with_a_smaller_mtu(two: tuple[Machine, Machine]) -> None:
    """What is too large for the way gets through: after the first packet, by which the kernel learns of it."""
    one, other = two
    one.sh(f"ip route add {other.address}/32 dev eth0 mtu lock 1300")
    one.until("netstore exec a ping -c1 -W5 -s 1400 b", seconds=60)
    assert one.sh("netstore exec a ping -c3 -s 1400 b | grep -c 'bytes from'") == "3"
    assert fetch(other) == one.sh("md5sum < /root/big | cut -d' ' -f1")
    one.sh(f"ip route del {other.address}/32 dev eth0")


def test_the_power_fails_in_the_middle_of_an_attach(two: tuple[Machine, Machine]) -> None:
    one, other = two
    script = "for n in $(seq 1 200); do netstore run -d --name many$n --network app bb; done"
    other.sh(
        f"systemd-run --collect sh -c '{script}'; until netstore ps -q --filter name=many | grep -q .; do sleep 0.1; done"
    )
    time.sleep(1)
    other.power_off()
    wait_until(lambda: states(one) == ["down", "up"], seconds=60, what="the loss of n2")
    assert one.run("netstore exec a nslookup b")[0], "a name of a machine that is lost"
    other.power_on()
    other.until("netstore exec b ping -c1 -W2 a")
    wait_until(lambda: states(one) == ["up", "up"], seconds=60, what="the return of n2")
    for machine in two:
        assert json.loads(machine.sh("netstore system check --format json")) == []
    names = other.sh("netstore ps -a --format '{{.Name}}' --filter name=many").split()
    other.sh(f"for each in {' '.join(names)}; do netstore start $each; done", seconds=1800)  # whole, or absent
    one.until(f"netstore exec a ping -c1 -W2 {names[-1]}")
    other.sh("netstore rm -f " + " ".join(names), seconds=1800)
    addresses = one.sh("netstore network inspect app")
    assert "many" not in addresses
