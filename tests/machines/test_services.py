"""netstored as a service of a whole Debian machine: systemd, udevd, nftables.service, AppArmor, cgroups v2; and its reboot."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from cluster.lab import Underlay
from conftest import wait_until
from machines.machine import Machine, machines

WEB = "http://198.51.100.1:8080/hello"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Underlay, Machine]]:
    """A machine with containers of every restart policy, with volumes of three kinds, a static address, a port."""
    with machines(tmp_path_factory.mktemp("m"), 1) as (underlay, [machine]):
        populate(machine)
        yield underlay, machine


def populate(machine: Machine) -> None:
    volumes = " ".join(f"-v {name}:/{name}" for name in ("plain", "filed", "memory", "disk"))
    machine.sh(
        f"""
        netstore network create --subnet 10.99.0.0/24 app
        netstore volume create plain
        netstore volume create -d image --size 32M filed
        netstore volume create -d tmpfs memory
        netstore volume create -d block -o serial=archive --format ext4 disk
        netstore run -d --restart always --name web --network app --ip 10.99.0.80 -p 8080:80 {volumes} bb httpd -f -h /data
        netstore exec web sh -c 'for each in plain filed disk; do echo kept > /$each/file; done'
        for policy in unless-stopped on-failure no; do
          netstore run -d --restart $policy --name $policy --network app bb
        done
        netstore run -d --restart unless-stopped --name stopped bb
        netstore stop -t 0 stopped
        sync""",
        seconds=500,
    )


def agrees(machine: Machine) -> bool:
    return json.loads(machine.run("netstore system check --format json")[1] or "[]") == []


def answers(underlay: Underlay) -> bool:
    return underlay.host.run("curl", "-s", "-m", "5", WEB, check=False).stdout == "hello\n"


def is_as_before(underlay: Underlay, machine: Machine) -> None:
    """What the policies say runs; with the addresses, the port and the volumes that it had."""
    wait_until(lambda: answers(underlay), seconds=90, what="the published port")
    runs = {"web", "unless-stopped", "on-failure"}
    wait_until(
        lambda: set(machine.sh("netstore ps --format '{{.Name}}'").split()) == runs, seconds=60, what="containers"
    )
    assert machine.sh("netstore exec web hostname -i") == "10.99.0.80"
    assert machine.sh("netstore exec web cat /plain/file /filed/file /disk/file").split() == ["kept"] * 3
    assert machine.sh("netstore exec unless-stopped wget -qO- http://web/hello") == "hello"
    assert agrees(machine)


def test_the_machine_is_debians(running: tuple[Underlay, Machine]) -> None:
    underlay, machine = running
    assert machine.sh("stat -fc %T /sys/fs/cgroup") == "cgroup2fs"
    assert machine.sh("cat /sys/module/apparmor/parameters/enabled; systemctl is-active apparmor systemd-udevd nftables").split() == [
        "Y", "active", "active", "active"
    ]  # fmt: skip
    assert "crun" in machine.sh("netstore system info")
    assert answers(underlay)
    assert agrees(machine)


def test_nftables_is_restarted(running: tuple[Underlay, Machine]) -> None:
    """Its unit flushes the whole ruleset."""
    underlay, machine = running
    machine.sh("systemctl restart nftables")
    wait_until(lambda: answers(underlay), what="the published port")
    assert agrees(machine)


@pytest.mark.parametrize("unit", ["netstored", "netstore-resolver"])
def test_one_that_hangs_is_started_again(running: tuple[Underlay, Machine], unit: str) -> None:
    underlay, machine = running
    machine.sh(f"mkdir -p /run/systemd/system/{unit}.service.d; cd /run/systemd/system/{unit}.service.d;"
               f"printf '[Service]\\nWatchdogSec=15\\n' > soon.conf; systemctl daemon-reload; systemctl restart {unit}")  # fmt: skip
    machine.sh(f"kill -STOP $(systemctl show -P MainPID {unit})")
    assert answers(underlay)
    machine.until(f"[ $(systemctl show -P NRestarts {unit}) -ge 1 ] && systemctl -q is-active {unit}", seconds=110)
    assert "watchdog" in machine.sh(f"journalctl -u {unit} -b --no-pager").lower()
    machine.sh(f"rm -r /run/systemd/system/{unit}.service.d; systemctl daemon-reload")
    is_as_before(underlay, machine)


def test_a_reboot(running: tuple[Underlay, Machine]) -> None:
    underlay, machine = running
    machine.reboot()
    is_as_before(underlay, machine)
    started = machine.sh("for each in nftables netstore-resolver netstored; do"
                         " systemctl show -P ActiveEnterTimestampMonotonic $each; done").split()  # fmt: skip
    assert started == sorted(started, key=int)


def test_the_power_fails(running: tuple[Underlay, Machine]) -> None:
    underlay, machine = running
    machine.power_off()
    machine.power_on()
    is_as_before(underlay, machine)
