"""CNI ADD and DEL through the binaries, as a runtime pays for them: netstore-cni beside bridge, host-local and portmap.
And `docker network connect`: netstore as dockerd's plugin beside its own bridge driver.

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


def main() -> None:
    """Print the table."""
    place = Path(sys.argv[1])
    sh("mkdir -p /run/docker; mount -t tmpfs docker /run/docker")  # where dockerd looks for plugins
    start_netstore(place, "[adapters.docker]\n")
    print(f"{'ms':<52}{'p50':>9}{'min':>9}{'p95':>9}")
    plugins(place)
    with dockerd(place) as tool:
        docker(tool)


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
