"""CNI ADD and DEL through the binaries, as a runtime pays for them: netstore-cni beside bridge, host-local and portmap.
And `docker network connect`: netstore as dockerd's plugin beside its own bridge driver; and `podman run`: netstore as
podman's netavark beside the real one.

Each round makes the same container with both, one after the other; a published port each. Docker's has none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import dockerd, sh, show, start_netstore

ROUNDS = 40
CRUN = """#!/bin/sh
# crun refuses hosts with both versions of cgroups: it sees one.
exec unshare -m --propagation slave sh -c 'umount -l /sys/fs/cgroup/unified 2>/dev/null; exec crun "$@"' crun "$@"
"""
HOOK = Path("netstore/cli/hook.py").absolute()
OURS = Path("packaging/netstore-cni").absolute()
PEERS = Path(".peers/usr/lib/cni").absolute()


def run(program: Path, command: str, container: str, config: dict[str, Any]) -> dict[str, Any]:
    """Call a plugin and return its result."""
    variables = {"CNI_COMMAND": command, "CNI_CONTAINERID": container, "CNI_NETNS": f"/run/netns/{container}",
                 "CNI_IFNAME": "eth0", "CNI_PATH": str(PEERS), "PATH": os.environ["PATH"]}  # fmt: skip
    done = subprocess.run([program], input=json.dumps(config).encode(), env=variables, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{program.name} {command}: {done.stdout.decode()}")
    return json.loads(done.stdout) if done.stdout else {}


def chain(container: str, ports: list[dict[str, Any]], place: Path) -> tuple[float, float, float]:
    """Add and delete with the reference plugins; returns the times of bridge with host-local, portmap, and DEL."""
    base = {"cniVersion": "1.0.0", "name": "peers"}
    bridge = base | {"type": "bridge", "bridge": "cni9", "isGateway": True, "ipMasq": False,
                     "ipam": {"type": "host-local", "subnet": "10.201.0.0/16", "dataDir": f"{place}/host-local",
                              "routes": [{"dst": "0.0.0.0/0"}]}}  # fmt: skip
    portmap = base | {"type": "portmap", "snat": True, "runtimeConfig": {"portMappings": ports}}
    started = time.perf_counter()
    result = run(PEERS / "bridge", "ADD", container, bridge)
    between = time.perf_counter()
    run(PEERS / "portmap", "ADD", container, portmap | {"prevResult": result})
    added = time.perf_counter()
    run(PEERS / "portmap", "DEL", container, portmap | {"prevResult": result})
    run(PEERS / "bridge", "DEL", container, bridge | {"prevResult": result})
    return between - started, added - between, time.perf_counter() - added


def docker(tool: str) -> None:
    """Connect a container to a network of each driver and disconnect it, in turns."""
    sh(
        f"mkdir -p /run/docker/root/bin; cp /bin/busybox /run/docker/root/bin; tar -C /run/docker/root -c . | {tool} import - bb"
    )
    sh(f"{tool} network create -d netstore --ipam-driver netstore netstore; {tool} network create theirs")
    sh(f"{tool} run -d --name cc bb /bin/busybox sleep 1000")
    series: dict[str, list[float]] = {}
    for _ in range(ROUNDS // 2):
        for network in ("netstore", "theirs"):
            for verb in ("connect", "disconnect"):
                started = time.perf_counter()
                sh(f"{tool} network {verb} {network} cc")
                series.setdefault(f"docker network {verb}, {network}", []).append((time.perf_counter() - started) * 1e3)
        started = time.perf_counter()
        sh(f"{tool} version")
        series.setdefault("docker version: the command alone", []).append((time.perf_counter() - started) * 1e3)
    for name, milliseconds in series.items():
        show(name.replace("theirs", "Docker's bridge"), milliseconds)
    sh(f"{tool} rm -f cc")


def podman(place: Path) -> None:
    """Run and remove a container with a published port, by our netavark and by the real one, and without a network."""
    engines = {}
    for name in ("netstore", "netavark"):
        at = place / f"podman-{name}"
        (at / "helpers").mkdir(parents=True)
        helper = OURS.read_text().replace('SOCKETS = "/run/netstore"', f'SOCKETS = "{place}/run"')
        (at / "helpers/netavark").write_bytes(
            helper.encode() if name == "netstore" else (PEERS.parent / "podman/netavark").read_bytes()
        )
        (at / "helpers/netavark").chmod(0o755)
        (at / "crun").write_text(CRUN)
        (at / "crun").chmod(0o755)
        (at / "containers.conf").write_text(
            f'[network]\nnetwork_config_dir = "{at}/net.d"\nnetwork_backend = "netavark"\n'
            f'[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\nhelper_binaries_dir = ["{at}/helpers"]\n'
            f'[engine.runtimes]\ncrun = ["{at}/crun"]\n[containers]\ncgroups = "disabled"\npids_limit = 0\n'
            'default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\n'
        )
        (at / "storage.conf").write_text(
            f'[storage]\ndriver = "vfs"\nrunroot = "{at}/runroot"\ngraphroot = "{at}/root"\n'
        )
        engines[name] = (
            f"env LD_LIBRARY_PATH={PEERS.parent}/x86_64-linux-gnu CONTAINERS_CONF={at}/containers.conf "
            f"CONTAINERS_STORAGE_CONF={at}/storage.conf {PEERS.parents[1]}/bin/podman --tmpdir {at}/tmp"
        )
    sh("mkdir -p /run/containers; mount -t tmpfs podman /run/containers; mount -t tmpfs podman /dev/shm")
    for name, tool in engines.items():
        sh(f"tar -C / -c bin/busybox -h --transform s,^,./, 2>/dev/null | {tool} import - bb")
        sh(f"{tool} network create --disable-dns --subnet 10.{202 + len(name) % 7}.0.0/16 app")
    series: dict[str, list[float]] = {}
    for index in range(-1, ROUNDS // 4):
        for name, tool in engines.items():
            published = f"--network app -p {40000 + index + 100 * len(name)}:80"
            for network, flags in ((f"-p, {name}", published), ("--network none", "--network none")):
                for verb in (f"run -d --name c {flags} bb /bin/busybox sleep 1000", "rm -f -t0 c"):
                    started = time.perf_counter()
                    sh(f"{tool} {verb} </dev/null >/dev/null 2>&1")  # conmon keeps what it is given
                    if index >= 0:
                        key = f"podman {verb.partition(' ')[0]} {network}"
                        series.setdefault(key, []).append((time.perf_counter() - started) * 1e3)
    for name, milliseconds in series.items():
        show(name, milliseconds)


def main() -> None:
    """Print the table."""
    place = Path(sys.argv[1])
    sh("mkdir -p /run/docker; mount -t tmpfs docker /run/docker")  # where dockerd looks for plugins
    start_netstore(place, "[adapters.docker]\n")
    print(f"{'ms':<52}{'p50':>9}{'min':>9}{'p95':>9}")
    plugins(place)
    hook(place)
    podman(place)
    with dockerd(place) as tool:
        docker(tool)


def hook(place: Path) -> None:
    """Measure the OCI runtimes' hook: the program alone, and with a network attached and detached."""
    sh(f".venv/bin/netstore -H unix://{place}/run/netstore.sock network create hooked")
    sleeper = subprocess.Popen(["unshare", "-nm", "sleep", "1000"])
    time.sleep(0.2)
    (place / "config.json").write_text('{"root": {"path": "/"}}')
    series: dict[str, list[float]] = {}
    for index in range(ROUNDS):
        state: dict[str, Any] = {"id": f"c{index}", "pid": sleeper.pid, "bundle": str(place)}
        asked = json.dumps(state | {"annotations": {"io.netstore.networks": "hooked"}})
        for stage, body in (("createRuntime", asked), ("poststop", asked), ("poststop, nothing asked for", "{}")):
            started = time.perf_counter()
            command = [HOOK, "--socket", f"{place}/run/hook.sock", stage.partition(",")[0]]
            subprocess.run(command, input=body.encode(), check=True)
            series.setdefault(f"netstore hook {stage}", []).append((time.perf_counter() - started) * 1e3)
    for name, milliseconds in series.items():
        show(name, milliseconds)
    sleeper.kill()
    sleeper.wait()


def plugins(place: Path) -> None:
    """Measure CNI's."""
    config = {"cniVersion": "1.0.0", "name": "bench", "type": "netstore-cni", "create": {},
              "socket": f"{place}/run/cni.sock"}  # fmt: skip
    series: dict[str, list[float]] = {}
    for index in range(-2, ROUNDS):
        ports = [{"hostPort": 30000 + index, "containerPort": 80, "protocol": "tcp"}]
        ours, theirs, nothing = (f"{name}{index}" for name in ("ours", "theirs", "nothing"))
        sh(f"ip netns add {ours}; ip netns add {theirs}")
        started = time.perf_counter()
        run(OURS, "ADD", ours, config | {"runtimeConfig": {"portMappings": ports}})
        added = time.perf_counter()
        run(OURS, "DEL", ours, config)
        deleted = time.perf_counter()
        run(OURS, "VERSION", nothing, config)
        times = {"netstore-cni ADD": added - started, "netstore-cni DEL": deleted - added,
                 "netstore-cni VERSION: the program alone": time.perf_counter() - deleted}  # fmt: skip
        times |= zip(
            ("bridge + host-local ADD", "portmap ADD", "bridge + host-local + portmap DEL"),
            chain(theirs, [ports[0] | {"hostPort": 40000 + index}], place),
            strict=True,
        )
        times["bridge + host-local + portmap ADD"] = times["bridge + host-local ADD"] + times["portmap ADD"]
        sh(f"ip netns del {ours}; ip netns del {theirs}")
        for name, seconds in times.items() if index >= 0 else ():
            series.setdefault(name, []).append(seconds * 1e3)
    for name, milliseconds in series.items():
        show(name, milliseconds)


main()
