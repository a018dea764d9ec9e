"""netstored as a service of a whole Debian machine: systemd, udevd, nftables.service, AppArmor, cgroups v2; and its reboot."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from cluster.lab import Underlay
from conftest import wait_until

from machines.machine import ROOT, Machine, machines

WEB = "http://198.51.100.1:8080/hello"
CONVERSATION = """
import select, socket, sys, time
link = socket.create_connection(("198.51.100.1", 7007), 30)
link.settimeout(30)
turns, longest = 0, 0.0
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0.02)[0]:
    begun = time.monotonic()
    link.sendall(b"%08d" % turns)
    assert link.recv(8, socket.MSG_WAITALL) == b"%08d" % turns
    turns, longest = turns + 1, max(longest, time.monotonic() - begun)
print(turns, longest)
"""


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
        seconds=1500,
    )


def agrees(machine: Machine) -> bool:
    return json.loads(machine.run("netstore system check --format json")[1] or "[]") == []


def answers(underlay: Underlay) -> bool:
    return underlay.host.run("curl", "-s", "-m", "30", WEB, check=False).stdout == "hello\n"


def is_as_before(underlay: Underlay, machine: Machine, *, rebooted: bool = False) -> None:
    """What the policies say runs; with the addresses, the port and the volumes that it had."""
    wait_until(lambda: answers(underlay), seconds=90, what="the published port")
    runs = {"web", "unless-stopped", "on-failure"} | (set() if rebooted else {"no"})
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
    machine.until(f"[ $(systemctl show -P NRestarts {unit}) -ge 1 ] && systemctl -q is-active {unit}")
    assert "watchdog" in machine.sh(f"journalctl -u {unit} -b --no-pager").lower()
    machine.sh(f"rm -r /run/systemd/system/{unit}.service.d; systemctl daemon-reload")
    is_as_before(underlay, machine)


def test_an_upgrade_under_traffic(running: tuple[Underlay, Machine]) -> None:
    """One connection from another machine to a published port is spoken on before, during and after a newer package."""
    underlay, machine = running
    machine.sh(f"""
        netstore run -d --name echo --network app -p 7007:7 bb busybox nc -ll -p 7 -e cat
        dpkg-deb -R {ROOT}/dist/netstore_*.deb /tmp/newer
        sed -i 's/^Version: .*/&+newer/' /tmp/newer/DEBIAN/control
        dpkg-deb -Znone -b /tmp/newer /tmp/newer.deb""", seconds=900)  # fmt: skip
    pids = "pgrep conmon; systemctl show -P MainPID netstored netstore-resolver"
    before = machine.sh(pids).split()
    talk = underlay.host.command(sys.executable, "-c", CONVERSATION)
    with subprocess.Popen(talk, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        machine.sh("dpkg -i /tmp/newer.deb", seconds=600)
        machine.sh("netstore exec unless-stopped wget -qO- http://web/hello")
        turns, longest = process.communicate("end\n")[0].split()
    after = machine.sh(pids).split()
    assert after[:-2] == before[:-2]  # containers are what they were
    assert set(after[-2:]).isdisjoint(before[-2:])  # the services are new
    assert machine.sh("dpkg-query -Wf '${Version}' netstore").endswith("+newer")
    print(f"{turns} turns of one connection during the upgrade, the longest {float(longest):.2f} s")
    assert int(turns) >= 10
    machine.sh("netstore rm -f echo; rm -r /tmp/newer*")
    is_as_before(underlay, machine)


def test_a_reboot(running: tuple[Underlay, Machine]) -> None:
    underlay, machine = running
    machine.reboot()
    is_as_before(underlay, machine, rebooted=True)
    assert machine.sh("netstore inspect -f '{{.Status.ExitCode}}' no") == "137"  # netstored ended it, on the way down
    started = machine.sh("for each in nftables netstore-resolver netstored; do"
                         " systemctl show -P ActiveEnterTimestampMonotonic $each; done").split()  # fmt: skip
    assert started == sorted(started, key=int)


def test_the_power_fails(running: tuple[Underlay, Machine]) -> None:
    underlay, machine = running
    machine.power_off()
    machine.power_on()
    is_as_before(underlay, machine, rebooted=True)
