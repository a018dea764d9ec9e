"""The package as dpkg and systemd have it, from installation to purge, on a machine of its own."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def sh(command: str, *, timeout: float = 120) -> str:
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        journal = subprocess.run(["journalctl", "-b", "-n40", "--no-pager"], capture_output=True, text=True).stdout
        pytest.fail(f"{command}: {done.stdout}{done.stderr}\n{journal}")
    return done.stdout.strip()


def shows(unit: str, *properties: str) -> dict[str, str]:
    shown = sh(f"systemctl show {unit} -p {','.join(properties)}")
    return dict(line.split("=", 1) for line in shown.splitlines())


@pytest.fixture
def leaks() -> None:
    """The whole module is looked at, from before the installation to after it is taken away."""


@pytest.fixture(scope="module")
def services() -> Iterator[None]:
    sh(f"dpkg -i {ROOT}/dist/*.deb", timeout=280)
    sh("mkdir -p /tmp/tree/bin /tmp/tree/etc; cp /bin/busybox /tmp/tree/bin; echo good > /tmp/tree/etc/answer;"
       "tar -C /tmp/tree -c . | netstore image import - busybox")  # fmt: skip
    yield
    sh("dpkg -P netstore")


def test_started_in_order(services: object) -> None:
    resolver = shows(
        "netstore-resolver", "Type", "ActiveState", "ActiveEnterTimestampMonotonic", "NRestarts", "StatusText"
    )
    daemon = shows("netstored", "Type", "ActiveState", "ExecMainStartTimestampMonotonic", "NRestarts")
    assert resolver["ActiveState"] == daemon["ActiveState"] == "active"
    assert resolver["Type"] == daemon["Type"] == "notify"
    assert int(resolver["ActiveEnterTimestampMonotonic"]) <= int(daemon["ExecMainStartTimestampMonotonic"])
    assert resolver["NRestarts"] == daemon["NRestarts"] == "0"
    assert len(sh("pgrep netstore-resolv").split()) == 1
    sh("systemctl restart netstored && netstore system info")  # started is when it answers
    assert json.loads(sh("netstore system check --format json")) == []
    assert sh("stat -c '%U:%G %a' /run/netstore/netstore.sock") == "root:netstore 660"


def test_cgroup_v2_alone_and_crun(services: object) -> None:
    """A container has one group, in the one hierarchy; its devices are what they were at its start, and that is said."""
    assert sh("awk '$3 ~ /^cgroup/ {print $2, $3}' /proc/self/mounts") == "/sys/fs/cgroup cgroup2"
    name = sh("netstore run -d --name held busybox busybox sleep 1000")
    pid = int(json.loads(sh("netstore inspect held"))[0]["status"]["pid"])
    assert Path(f"/proc/{pid}/cgroup").read_text().startswith(f"0::/netstore/{name}")
    assert "/crun" in sh("pgrep -a conmon")
    assert sh("netstore exec held busybox cat /proc/self/cgroup") == "0::/"  # the host's tree is hidden
    disk = sh("truncate -s 32M /tmp/disk; losetup --show -f /tmp/disk")
    sh(f"netstore volume create -d block --type block -o path={disk} late")
    late = subprocess.run(["netstore", "volume", "attach", "late", "held:/dev/late"], capture_output=True, text=True)
    assert late.returncode
    assert "stop the container" in late.stderr
    sh("netstore run --rm -v late:/dev/late busybox busybox dd if=/dev/late of=/dev/null bs=1M count=1")
    sh(f"netstore rm -f held; netstore volume rm late; losetup -d {disk}; rm /tmp/disk")
    assert not Path(f"/sys/fs/cgroup/netstore/{name}").exists()


def test_apparmor_as_debian_ships_it(services: object) -> None:
    """Profiles are loaded and in force; none is for us, none is in our way: the kernel has denied nothing."""
    assert sh("cat /sys/module/apparmor/parameters/enabled; systemctl is-active apparmor").split() == ["Y", "active"]
    assert "(enforce)" in sh("cat /sys/kernel/security/apparmor/profiles")
    sh("netstore run --rm busybox busybox true")
    assert sh("cat /proc/$(systemctl show -P MainPID netstored)/attr/apparmor/current") == "unconfined"
    assert "DENIED" not in sh("journalctl -b --no-pager -k -g apparmor || true")


def test_beside_udevd(services: object) -> None:
    """It leaves our interfaces the names and MAC addresses that they have; disks are found by the links that it makes."""
    assert sh("systemctl is-active systemd-udevd") == "active"
    sh("netstore network create quiet; netstore run -d --name held --network quiet busybox busybox sleep 1000")
    links = "for each in /sys/class/net/ns*; do echo $each $(cat $each/address); done"
    before = sh(links)
    assert before.count("/ns") >= 2  # a bridge, and an end of a pair
    sh("udevadm trigger --action=add --subsystem-match=net; udevadm settle")
    assert sh(links) == before
    sh("netstore network inspect quiet; netstore rm -f held; netstore network rm quiet")
    disk = sh(
        "truncate -s 32M /tmp/disk; mkfs.ext4 -q -L archive /tmp/disk; losetup --show -f /tmp/disk; udevadm settle"
    )
    sh("netstore volume create -d block -o path=/dev/disk/by-label/archive found;"
       "netstore run --rm -v found:/found busybox busybox touch /found/file; netstore volume rm found")  # fmt: skip
    sh(f"losetup -d {disk}; rm /tmp/disk")
    assert json.loads(sh("netstore system check --format json")) == []


CLIENT = "while :; do busybox wget -qO- http://web/answer || echo lost; busybox usleep 20000; done"


def answers() -> int:
    lines = sh("netstore logs client").split()
    assert "lost" not in lines
    return len(lines)


def more_answers() -> None:
    before, end = answers(), time.monotonic() + 60
    while answers() < before + 5:
        assert time.monotonic() < end


def test_upgraded_under_traffic(services: object) -> None:
    sh("netstore network create app;"
       "netstore run -d --name web --network app busybox busybox httpd -f -p 80 -h /etc;"
       f"netstore run -d --name client --network app busybox busybox sh -c '{CLIENT}'")  # fmt: skip
    more_answers()
    sh("(echo '# mine'; cat /etc/netstore/netstored.toml) > /tmp/mine; cp /tmp/mine /etc/netstore/netstored.toml")
    before = sh("pgrep conmon; systemctl show -p MainPID netstored netstore-resolver").split()
    sh(f"dpkg -i {ROOT}/dist/*.deb", timeout=280)
    after = sh("pgrep conmon; systemctl show -p MainPID netstored netstore-resolver").split()
    assert after[:2] == before[:2]  # containers are what they were
    assert set(after[2:]).isdisjoint(before[2:])  # the services are new
    more_answers()
    assert sh("cmp /tmp/mine /etc/netstore/netstored.toml") == ""
    assert json.loads(sh("netstore system check --format json")) == []


def test_removed_and_installed_again(services: object) -> None:
    sh("dpkg -r netstore", timeout=280)
    gone()
    sh(f"dpkg -i {ROOT}/dist/*.deb", timeout=280)
    sh("netstore start web client; timeout 60 sh -c 'until netstore logs -n 1 client | grep good; do sleep 0.5; done'")


def test_purged(services: object) -> None:
    """It takes containers along even where netstored does not start."""
    sh("echo nonsense >> /etc/netstore/netstored.toml; systemctl kill -s KILL netstored")
    sh("dpkg -P netstore", timeout=280)
    gone()
    assert sh("find / -xdev -path /proc -prune -o -path '*netstore*' ! -path '*/site-packages/*' -print | grep -v "
              f"-e {ROOT} -e /var/log -e /var/lib/dpkg || true") == ""  # fmt: skip
    assert sh("getent passwd netstore-resolver; getent group netstore; true") == ""
    assert "not-found" in sh("systemctl show -p LoadState netstored netstore-resolver")


def gone() -> None:
    """Nothing of it runs, and nothing of it is in the kernel."""
    sh("timeout 30 sh -c 'while pgrep -a \"conmon|crun|netstore\"; do sleep 0.2; done'")
    kernel = "ip link; nft list tables; find /sys/fs/cgroup -name netstore; awk '{print $5}' /proc/self/mountinfo"
    assert sh(f"({kernel}) | grep -e nsbr -e netstore | grep -v {ROOT} || true") == ""
