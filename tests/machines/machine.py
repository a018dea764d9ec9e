"""Fixtures: whole machines with a kernel, a disk and a power cord of their own (QEMU), on the wire of tests/cluster."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from cluster.lab import UNDERLAY, Underlay

LAB = Path(os.environ.get("NETSTORE_TEST_MACHINES", "/nonexistent"))
ROOT = Path(__file__).parents[2]
_BOOT_SECONDS, _SECONDS = 900, 600  # generous: on a busy host emulated machines are slow
_NUMBERS = count()


class Machine:
    """A machine with the address .NUMBER on `eth0`, and a blank disk `archive`; its tap on the wire is `m<number>`."""

    def __init__(self, underlay: Underlay, number: int, *, memory: str = "1G") -> None:
        self.name, self.address = f"n{number}", f"{UNDERLAY}.{number}"
        self._underlay, self._number, self._memory = underlay, number, memory
        self._disk, self._port = underlay.place / f"{self.name}.qcow2", underlay.place / f"{self.name}.agent"
        self._archive = underlay.place / f"{self.name}.archive"
        self._archive.touch()
        os.truncate(self._archive, 64 << 20)
        self._process: subprocess.Popen[bytes] | None = None
        underlay.host.sh(f"ip tuntap add m{number} mode tap; ip link set m{number} master wire up")
        base = ("-b", str(LAB / "machine.img"), "-F", "raw")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *base, str(self._disk)], check=True)

    def power_on(self) -> None:
        """Start it, and wait until it takes commands."""
        number = self._number
        # A minute's work may take ten of them on a busy host; nobody logs in.
        command = (
            "root=/dev/vda rw console=ttyS0 quiet mitigations=off no_timer_check net.ifnames=0"
            " systemd.default_timeout_start_sec=900 systemd.default_device_timeout_sec=900"
            f" systemd.mask=serial-getty@ttyS0.service lab.path={ROOT}"
        )
        qemu = [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "Nehalem", "-smp", "1",
            "-m", self._memory, "-nodefaults", "-display", "none", "-kernel", f"{LAB}/vmlinuz", "-initrd", f"{LAB}/initrd",
            "-append", f"{command} lab.agent",
            *_disk("root", f"file={self._disk},format=qcow2,cache=unsafe"),
            *_disk("checkout", f"file={LAB}/checkout.img,format=raw,snapshot=on"),
            *_disk("archive", f"file={self._archive},format=raw,cache=unsafe"),
            "-netdev", f"tap,id=wire,ifname=m{number},script=no,downscript=no",
            "-device", f"virtio-net-pci,netdev=wire,mac=52:54:00:00:00:{number:02x}",
            "-device", "virtio-serial", "-chardev", f"socket,id=agent,path={self._port},server=on,wait=off",
            "-device", "virtserialport,chardev=agent,name=lab.agent",
            "-serial", f"file:{LAB}/{self.name}.log",
        ]  # fmt: skip
        self._process = subprocess.Popen(self._underlay.host.command(*qemu))
        self.wait()

    def wait(self) -> None:
        """Wait until it takes commands: after a start, or a reboot."""
        end = time.monotonic() + _BOOT_SECONDS
        while time.monotonic() < end:
            try:
                if self.run("true", seconds=5, patience=10)[0] == 0:
                    return
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"{self.name} does not answer: see .lab/{self.name}.log")

    def power_off(self) -> None:
        """Pull the cord."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._port.unlink(missing_ok=True)

    def reboot(self) -> None:
        """Let systemd reboot it, and wait until it takes commands again."""
        boot = "cat /proc/sys/kernel/random/boot_id"
        before = self.sh(boot)
        self.run("systemctl reboot")
        end = time.monotonic() + _BOOT_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(OSError):  # who goes down may not answer what it was asked
                code, found = self.run(boot, seconds=5, patience=10)
                if code == 0 and found != before:
                    return
            time.sleep(0.5)
        pytest.fail(f"{self.name} does not reboot: see .lab/{self.name}.log")

    def run(self, command: str, *, seconds: float = _SECONDS, patience: float = 30) -> tuple[int, str]:
        """Run a command of bash as root; returns its status and what it printed."""
        with socket.socket(socket.AF_UNIX) as port:
            port.settimeout(seconds + patience)
            port.connect(str(self._port))
            number = next(_NUMBERS)
            port.sendall(
                b"\n" + json.dumps({"number": number, "command": command, "seconds": seconds}).encode() + b"\n"
            )
            with port.makefile("rb") as lines:
                for answer in map(json.loads, lines):
                    if answer["number"] == number:  # others are to callers that gave up
                        return answer["code"], answer["output"].strip()
        raise ConnectionError(f"{self.name} hung up")

    def sh(self, command: str, *, seconds: float = _SECONDS) -> str:
        """Run a command that has to succeed; returns what it printed."""
        code, output = self.run(command, seconds=seconds)
        if code:
            pytest.fail(f"{self.name}: {command}: {code}: {output}")
        return output

    def until(self, command: str, *, seconds: float = _SECONDS) -> None:
        """Wait for a command to succeed."""
        self.sh(f"until {command}; do sleep 1; done >/dev/null 2>&1", seconds=seconds)


def _disk(serial: str, drive: str) -> list[str]:
    return ["-drive", f"id={serial},if=none,{drive}", "-device", f"virtio-blk-pci,drive={serial},serial={serial}"]


@contextmanager
def machines(place: Path, number: int) -> Iterator[tuple[Underlay, list[Machine]]]:
    """Switch on machines n1 to n<number> with netstore installed, each with its address, name and an image `bb`."""
    underlay = Underlay(place)
    made = [Machine(underlay, each + 1) for each in range(number)]
    try:
        with ThreadPoolExecutor(number) as pool:
            list(pool.map(_set_up, made))
        yield underlay, made
    finally:
        for machine in made:
            machine.power_off()
        underlay.close()


def _set_up(machine: Machine) -> None:
    machine.power_on()
    network = f"[Match]\\nName=eth0\\n[Network]\\nAddress={machine.address}/24\\nGateway={UNDERLAY}.254\\n"
    machine.sh(f"hostnamectl hostname {machine.name}; printf '{network}' > /etc/systemd/network/eth0.network")
    machine.sh("networkctl reload; until ip -4 addr show eth0 | grep inet; do sleep 0.2; done")
    machine.until("netstore system info", seconds=_BOOT_SECONDS)
    links = " ".join(("sh", "cat", "sleep", "httpd", "ping", "nslookup", "wget", "ip", "hostname"))
    machine.sh(f"mkdir -p /root/bb/bin /root/bb/data; cp /bin/busybox /root/bb/bin; echo hello > /root/bb/data/hello;"
               f"for name in {links}; do ln -s busybox /root/bb/bin/$name; done;"
               "tar -C /root/bb -c . | netstore image import --cmd 'sleep 1000000' - bb")  # fmt: skip
