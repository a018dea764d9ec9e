"""Debian's podman 4 with its CNI backend: networks, ports, names, connect and disconnect by netstore-cni."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Host, Node, wait_until
from test_cni import program_of

PEERS = Path(__file__).parents[3] / ".peers"
CAPABILITIES = dict.fromkeys(("portMappings", "bandwidth", "ips", "mac", "dns", "aliases"), True)
LIBRARIES = f"LD_LIBRARY_PATH={PEERS}/usr/lib/x86_64-linux-gnu"
HTTPD = ("bb", "/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/etc")

pytestmark = pytest.mark.skipif(
    not (PEERS / "usr/bin/podman").exists(),
    reason="no podman: scripts/peers podman libsubid4 fetches it, as scripts/test does",
)


@dataclass
class Podman:
    """Podman with directories of its own, and netstore-cni as its only plugin."""

    host: Host
    place: Path

    def configure(self, program: Path) -> None:
        place, networks, plugins = self.place, self.place / "net.d", self.place / "bin"
        for each in (networks, plugins):
            each.mkdir(parents=True)
        shutil.copy(program, plugins / "netstore-cni")
        (place / "containers.conf").write_text(
            f'[network]\nnetwork_backend = "cni"\ncni_plugin_dirs = ["{plugins}"]\nnetwork_config_dir = "{networks}"\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
            '[containers]\ncgroups = "disabled"\npids_limit = 0\n'
            'default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\n'  # its own are above what root may set here
        )
        (place / "storage.conf").write_text(
            f'[storage]\ndriver = "vfs"\nrunroot = "{place}/runroot"\ngraphroot = "{place}/root"\n'
        )
        for name, subnet in (("podman", "10.78.0.0/24"), ("app", "10.79.0.0/24")):
            plugin = {"type": "netstore-cni", "create": {"subnet": subnet}, "capabilities": CAPABILITIES}
            listed = {"cniVersion": "0.4.0", "name": name, "plugins": [plugin]}
            (networks / f"{name}.conflist").write_text(json.dumps(listed))

    def __call__(self, *args: str) -> str:
        settings = [
            f"CONTAINERS_CONF={self.place}/containers.conf",
            f"CONTAINERS_STORAGE_CONF={self.place}/storage.conf",
        ]
        command = ["env", LIBRARIES, *settings, str(PEERS / "usr/bin/podman"), "--tmpdir", f"{self.place}/tmp", *args]
        return self.host.run(*command).stdout.strip()

    def run(self, name: str, *args: str) -> None:
        """Run a container in the background; its conmon must not keep our pipes."""
        self("create", "--name", name, *args)
        self("start", name)

    def address(self, name: str, network: str) -> str:
        shown: dict[str, Any] = json.loads(self("inspect", name, "--format", "{{json .NetworkSettings.Networks}}"))
        return str(shown[network]["IPAddress"])


@pytest.fixture
def podman(node: Node, busybox_tar: Path) -> Iterator[Podman]:
    """A podman whose containers are removed in the end."""
    podman = Podman(node.host, node.place / "podman")
    podman.configure(program_of(node))
    # crun refuses hybrid hosts; the machine's own mounts are not these.
    node.host.sh("umount -l /sys/fs/cgroup/unified 2>/dev/null || true")
    podman("import", str(busybox_tar), "bb")
    yield podman
    podman("rm", "-af", "-t0")
    node.host.sh(f"umount -l {podman.place}/root {podman.place}/runroot || true")


@pytest.mark.timeout(180)  # a dozen commands of podman's
def test_podman(podman: Podman, node: Node) -> None:
    """What a user of podman does: run with ports, names, static addresses, connect, disconnect, reload, stop, start."""
    podman.run(
        "web", "--network", "app", "-p", "8080:80", "--ip", "10.79.0.40", "--mac-address", "02:00:00:00:00:40", *HTTPD
    )
    assert podman.address("web", "app") == "10.79.0.40"
    wanted = podman("exec", "web", "cat", "/etc/hostname")

    def reached() -> bool:
        return node.host.sh("ip netns exec neighbour curl -s -m2 203.0.113.1:8080/hostname || true").strip() == wanted

    wait_until(reached, what="the published port")
    fetch = ("run", "--rm", "--network", "app", "bb", "/bin/busybox", "wget", "-qO-")
    assert podman(*fetch, "http://web/hostname") == wanted
    assert len(node.out("endpoint", "ls", "-q").split()) == 1  # the other one is gone with its container
    podman("network", "reload", "web")  # conmon listens on the port meanwhile
    wait_until(reached, what="the published port, reloaded")
    podman("network", "disconnect", "app", "web")
    assert node.out("endpoint", "ls", "-q") == ""
    podman("network", "connect", "--alias", "www", "app", "web")
    wait_until(reached, what="the published port, connected again")
    assert podman(*fetch, "http://www/hostname") == wanted
    node.kill()
    assert reached()
    node.start()
    podman("stop", "-t0", "web")
    podman("start", "web")
    wait_until(reached, what="the published port, started again")
    podman("rm", "-f", "-t0", "web")
    assert node.out("endpoint", "ls", "-q") == ""
    assert node.out("system", "check") == "kernel and store agree"


@pytest.mark.timeout(120)
def test_podman_without_netstored(podman: Podman, node: Node) -> None:
    """What podman prints when netstored is away says so; afterwards all is well."""
    podman("create", "--name", "web", *HTTPD)
    node.kill()
    with pytest.raises(pytest.fail.Exception, match="is netstored running"):
        podman("start", "web")
    node.start()
    podman("start", "web")
    assert podman.address("web", "podman").startswith("10.78.0.")
    assert subprocess.run(node.host.command("ping", "-c1", "-W2", podman.address("web", "podman"))).returncode == 0
