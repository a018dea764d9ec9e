"""Bundles for OCI runtimes whose hooks are netstore's."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import Node

HOOK = Path(__file__).parents[3] / "netstore/cli/hook.py"
MOUNTS = [
    {"destination": "/proc", "type": "proc", "source": "proc"},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
]
CAPABILITIES = ["CAP_DAC_OVERRIDE", "CAP_NET_BIND_SERVICE", "CAP_CHOWN", "CAP_FOWNER"]
NAMESPACES = ["pid", "network", "ipc", "uts", "mount"]


def hooks(node: Node, *stages: str) -> dict[str, list[dict[str, Any]]]:
    """Return `hooks` of a configuration."""
    socket = f"{node.place}/run/hook.sock"
    return {
        stage: [{"path": str(HOOK), "args": ["netstore-hook", "--socket", socket, stage]}]
        for stage in stages or ("createRuntime", "poststop")
    }


def configuration(node: Node, annotations: dict[str, str], **more: Any) -> dict[str, Any]:
    """Return a configuration of busybox's HTTP server, in namespaces of its own."""
    process = {"args": ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/data"], "cwd": "/", "user": {"uid": 0, "gid": 0},
               "env": ["PATH=/bin"], "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES)}  # fmt: skip
    return {
        "ociVersion": "1.0.0", "process": process, "root": {"path": "rootfs"}, "mounts": MOUNTS, "hooks": hooks(node),
        "annotations": annotations, "linux": {"namespaces": [{"type": kind} for kind in NAMESPACES]},
    } | more  # fmt: skip


@dataclass
class Runtime:
    """crun or runc in a node's host; containers are called by name and have a bundle each."""

    node: Node
    program: str
    rootfs: Path
    names: list[str] = field(default_factory=list)

    def bundle(self, name: str, annotations: dict[str, str], **more: Any) -> Path:
        bundle = self.node.place / "bundles" / name
        (bundle / "rootfs").mkdir(parents=True, exist_ok=True)
        subprocess.run(["tar", "-C", bundle / "rootfs", "-xf", self.rootfs], check=True)
        (bundle / "config.json").write_text(json.dumps(configuration(self.node, annotations, **more)))
        return bundle

    def __call__(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the runtime; what it starts must not keep our pipes."""
        manager = ["--cgroup-manager=disabled"] if self.program == "crun" else []
        command = self.node.host.command("unshare", "-m", "--propagation", "slave", "sh", "-c",
            'umount -l /sys/fs/cgroup/unified 2>/dev/null; exec "$@"', "sh",
            self.program, f"--root={self.node.place}/runtime", *manager, *args)  # fmt: skip
        path = self.node.place / f"{args[0]}-{args[-1]}.log"
        path.unlink(missing_ok=True)
        with path.open("a+") as log:  # the hook appends beside crun
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=60)
            log.seek(0)
            told = subprocess.CompletedProcess(command, done.returncode, log.read(), "")
        assert not check or not told.returncode, told.stdout
        return told

    def run(self, name: str, annotations: dict[str, str], *, check: bool = True, **more: Any) -> str:
        """Start a container; returns what was said."""
        bundle = self.bundle(name, annotations, **more)
        self.names.append(name)
        pid_file = f"{bundle}/pid"
        return self("run", "-d", f"--pid-file={pid_file}", f"--bundle={bundle}", name, check=check).stdout

    def pid(self, name: str) -> int:
        return int((self.node.place / "bundles" / name / "pid").read_text())

    def exec(self, name: str, *args: str) -> str:
        return self.node.host.run(
            "nsenter", "-t", str(self.pid(name)), "-n", "-m", "-p", "-r", "-w", "--", *args
        ).stdout

    def delete(self, name: str) -> None:
        self("delete", "--force", name, check=False)

    def clean(self) -> None:
        for name in self.names:
            self.delete(name)
