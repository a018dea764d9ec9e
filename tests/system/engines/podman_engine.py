"""Debian's podman in a host's namespaces, with directories of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Host, Node
from test_cni import program_of

PEERS = Path(__file__).parents[3] / ".peers"
CAPABILITIES = dict.fromkeys(("portMappings", "bandwidth", "ips", "mac", "dns", "aliases"), True)
LIBRARIES = f"LD_LIBRARY_PATH={PEERS}/usr/lib/x86_64-linux-gnu"
HTTPD = ("bb", "/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/etc")
_CRUN = """#!/bin/sh
# crun refuses hosts with both versions of cgroups: it sees one.
exec unshare -m --propagation slave sh -c 'umount -l /sys/fs/cgroup/unified 2>/dev/null; exec crun "$@"' crun "$@"
"""
needs_podman = pytest.mark.skipif(
    not (PEERS / "usr/bin/podman").exists(),
    reason="no podman: scripts/peers podman libsubid4 fetches it, as scripts/test does",
)


@dataclass
class Podman:
    """Podman; its network commands are the program of a node."""

    host: Host
    place: Path

    def configure(self, network: str, engine: str = "") -> None:
        """Write podman's configuration, with what comes into two of its tables."""
        runtime = self.place / "crun"
        runtime.write_text(_CRUN)
        runtime.chmod(0o755)
        (self.place / "containers.conf").write_text(
            f'[network]\nnetwork_config_dir = "{self.place}/net.d"\n{network}\n'
            f'[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n{engine}\n'
            '[containers]\ncgroups = "disabled"\npids_limit = 0\n'
            'default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\n'  # its own are above what root may set here
            f'[engine.runtimes]\ncrun = ["{runtime}"]\n'
        )
        (self.place / "storage.conf").write_text(
            f'[storage]\ndriver = "vfs"\nrunroot = "{self.place}/runroot"\ngraphroot = "{self.place}/root"\n'
        )

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

    def network(self, name: str, network: str) -> Any:
        """Return what podman says of a container on a network."""
        return json.loads(self("inspect", name, "--format", "{{json .NetworkSettings.Networks}}"))[network]


def with_cni(podman: Podman, node: Node) -> None:
    """Let podman use netstore-cni alone, on two networks."""
    networks, plugins = podman.place / "net.d", podman.place / "bin"
    for each in (networks, plugins):
        each.mkdir(parents=True)
    shutil.copy(program_of(node), plugins / "netstore-cni")
    podman.configure(f'network_backend = "cni"\ncni_plugin_dirs = ["{plugins}"]')
    for name, subnet in (("podman", "10.78.0.0/24"), ("app", "10.79.0.0/24")):
        plugin = {"type": "netstore-cni", "create": {"subnet": subnet}, "capabilities": CAPABILITIES}
        listed = {"cniVersion": "0.4.0", "name": name, "plugins": [plugin]}
        (networks / f"{name}.conflist").write_text(json.dumps(listed))


def with_netavark(podman: Podman, node: Node) -> None:
    """Let podman use our program as its netavark."""
    helpers = podman.place / "helpers"
    helpers.mkdir(parents=True)
    shutil.copy(program_of(node), helpers / "netavark")
    (helpers / "aardvark-dns").symlink_to("netavark")  # podman warns where it is missing; nobody calls it
    podman.configure('network_backend = "netavark"', f'helper_binaries_dir = ["{helpers}"]')


@contextmanager
def running(podman: Podman, image: Path) -> Iterator[Podman]:
    """Give a configured podman an image, and remove its containers in the end."""
    podman.host.sh("mkdir -p /run/containers; for at in /run/containers /dev/shm; do mount -t tmpfs podman $at; done")
    podman("import", str(image), "bb")
    yield podman
    podman("rm", "-af", "-t0")
    podman.host.sh(f"umount -l {podman.place}/root {podman.place}/runroot /run/containers /dev/shm || true")
