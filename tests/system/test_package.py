"""The Debian package: installed, upgraded and purged by dpkg in a copy of this machine's root. With systemd: tests/lab."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import Host, wait_until

ROOT = Path(__file__).parents[2]
# What dpkg, useradd and a daemon's bytecode leave behind on any Debian.
_OTHERS = ("/var/lib/dpkg", "/var/lib/systemd", "/var/log", "/var/cache", "/etc/passwd", "/etc/group", "/etc/shadow",
           "/etc/gshadow", "/etc/subuid", "/etc/subgid", "/etc/.pwd.lock", "/tmp")  # fmt: skip


@pytest.fixture(scope="module")
def package() -> Path:
    """The package of this tree."""
    subprocess.run([ROOT / "scripts" / "package"], check=True, timeout=160)
    return next((ROOT / "dist").glob("*.deb"))


def raised(package: Path, place: Path, version: str) -> Path:
    """The same package under a later version."""
    tree = place / "raised"
    subprocess.run(["dpkg-deb", "-R", package, tree], check=True)
    control = tree / "DEBIAN" / "control"
    lines = control.read_text().splitlines(keepends=True)
    control.write_text("".join(f"Version: {version}\n" if line.startswith("Version:") else line for line in lines))
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "-b", tree, place / "raised.deb"], check=True)
    return place / "raised.deb"


@pytest.mark.timeout(240)
def test_installed_upgraded_purged(host: Host, place: Path, package: Path) -> None:
    layers, root = place / "layers", place / "layers" / "root"
    layers.mkdir()
    host.sh(
        f"mount -t tmpfs layers {layers}; cd {layers}; mkdir upper work root;"
        "mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root;"
        "mount -t proc proc root/proc; mount --rbind /dev root/dev; mount -t tmpfs run root/run; rm -rf root/etc/netstore"
    )

    def inside(command: str, *, check: bool = True) -> str:
        return host.run("chroot", str(root), "sh", "-c", command, check=check, timeout=60).stdout

    def install(deb: Path) -> None:
        host.sh(f"cp {deb} {root}/tmp/netstore.deb; chroot {root} dpkg -i /tmp/netstore.deb")

    def left() -> set[str]:
        found = host.sh(f"cd {layers}/upper; find . ! -type d").splitlines()
        return {name for each in found if not (name := each.removeprefix(".")).startswith(_OTHERS)}

    before = left()
    install(package)
    assert inside("dpkg -V netstore") == ""
    assert inside("netstore --version").strip() == "netstore, version 0.1.0"
    assert inside("id -un netstore-resolver; getent group netstore | cut -d: -f1").split() == [
        "netstore-resolver",
        "netstore",
    ]
    wants = "/etc/systemd/system/multi-user.target.wants"
    assert {f"{wants}/netstored.service", f"{wants}/netstore-resolver.service"} <= left()
    inside("systemd-analyze verify /lib/systemd/system/netstored.service /lib/systemd/system/netstore-resolver.service")
    answered = inside('echo \'{"cniVersion": "1.1.0"}\' | CNI_COMMAND=VERSION /opt/cni/bin/netstore-cni')
    assert "supportedVersions" in answered
    inside("echo '{}' | /usr/libexec/netstore/netstore-hook poststop && echo '{}' | netstore hook poststop")

    daemon = subprocess.Popen(host.command("chroot", str(root), "netstored"), stderr=subprocess.DEVNULL)
    wait_until(lambda: host.run("chroot", str(root), "netstore", "system", "info", check=False).returncode == 0)
    inside("netstore network create app; netstore volume create data; echo kept > /var/lib/netstore/kept")
    assert "nsbr-" in host.sh("ip -o link")
    inside("echo '# mine' >> /etc/netstore/netstored.toml")
    install(raised(package, place, "0.1.1"))
    assert inside("netstore network ls -q --filter name=app")  # dpkg starts nothing here, and stopped nothing
    assert "# mine" in inside("cat /etc/netstore/netstored.toml")
    daemon.kill()
    daemon.wait()

    inside("dpkg -r netstore")
    assert "nsbr-" not in host.sh("ip -o link")
    assert "netstore" not in host.sh("nft list tables")
    assert inside("cat /var/lib/netstore/kept /etc/netstore/netstored.toml | grep -c -e kept -e '# mine'") == "2\n"
    inside("dpkg -P netstore")
    assert left() == before
    assert inside("getent passwd netstore-resolver; getent group netstore", check=False) == ""
