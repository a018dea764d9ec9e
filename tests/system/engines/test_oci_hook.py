"""The OCI hook with crun and runc: attached before a container starts, gone after it, whoever is killed in between."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Node, wait_until
from oci_bundle import HOOK, Runtime, hooks
from test_cni import storm


@pytest.fixture(params=["crun", "runc"])
def runtime(request: pytest.FixtureRequest, node: Node, busybox_tar: Path) -> Iterator[Runtime]:
    """A runtime whose containers are removed in the end; the node has a network and a volume."""
    if not shutil.which(request.param):
        pytest.skip(f"no {request.param}")
    runtime = Runtime(node, request.param, busybox_tar)
    node.cli("network", "create", "--subnet", "10.1.0.0/24", "app")
    node.cli("network", "create", "--internal", "db")
    node.cli("volume", "create", "-d", "image", "-o", "size=32M", "data")
    yield runtime
    runtime.clean()


def left(node: Node) -> list[str]:
    return [*node.out("endpoint", "ls", "-q").split(), *node.out("volume", "mounts", "-q").split()]


def test_life(runtime: Runtime) -> None:
    node = runtime.node
    asked = {
        "io.netstore.networks": "app,ip=10.1.0.5,alias=www; db",
        "io.netstore.ports": "8080:80;8443:443/udp",
        "io.netstore.volumes": "data:/var/lib/x;data:/data/read:ro",
        "other.annotation": "x",
    }
    runtime.run("web", asked)
    by_old_name = hooks(node, "prestart", "poststop")
    runtime.run("peer", {"io.netstore.networks": "app", "io.netstore.volumes": "data:/read:ro"}, hooks=by_old_name)
    fetch = "ip netns exec neighbour curl -s -m2 203.0.113.1:8080/hello || true"
    wait_until(lambda: node.host.sh(fetch) == "from the image\n", what="the port")
    assert "10.1.0.5/24" in runtime.exec("web", "/bin/ip", "addr", "show", "eth0")
    assert "eth1" in runtime.exec("web", "/bin/ip", "link")
    for name in ("www", "web"):
        assert "10.1.0.5" in runtime.exec("peer", "/bin/nslookup", name, "127.0.0.11")
    runtime.exec("web", "/bin/sh", "-c", "echo kept > /var/lib/x/file")
    assert (
        runtime.exec("peer", "/bin/cat", "/read/file") == runtime.exec("web", "/bin/cat", "/data/read/file") == "kept\n"
    )
    assert "ro," in runtime.exec("peer", "/bin/sh", "-c", "mount | grep /read")
    assert node.cli("volume", "rm", "data", check=False).returncode
    assert node.out("system", "check") == "kernel and store agree"
    shown = json.loads(node.out("endpoint", "inspect", node.out("endpoint", "ls", "-q").split()[0]))[0]
    assert shown["labels"]["oci.container-id"] == "web"
    runtime.delete("web")
    assert "10.1.0.5" not in node.out("endpoint", "ls")
    runtime.run("web", asked)  # the same address and ports once more
    runtime.delete("web")
    runtime.delete("peer")
    assert left(node) == []
    node.cli("volume", "rm", "data")
    node.cli("network", "rm", "app", "db")


def test_refused(runtime: Runtime) -> None:
    """What cannot be given keeps the container from being created, with a message that names it; nothing is left."""
    node = runtime.node
    runtime.run("first", {"io.netstore.networks": "app,ip=10.1.0.5", "io.netstore.ports": "8080:80"})
    before = left(node)
    for asked, said in (
        ({"networks": "nosuch"}, "no such network: nosuch"), ({"networks": "app,ip=x"}, "'x'"),
        ({"networks": "app,ip=10.1.0.5"}, "10.1.0.5"), ({"networks": "app,tea=x"}, "tea=x"), ({"networks": "app;app,alias=x"}, "differs"),
        ({"networks": "host"}, "host"), ({"networks": "app,"}, "keys are"), ({"network": "app"}, "io.netstore.networks"),
        ({"networks": "app", "ports": "8080:80"}, "8080/tcp is taken by endpoint first"), ({"ports": "80"}, "needs a network"),
        ({"networks": "app", "ports": "0:x"}, "0:x"), ({"networks": "app", "name": "no name"}, "no name"),
        ({"volumes": "nosuch:/x"}, "nosuch"), ({"volumes": "/etc:/x"}, "/etc:/x"), ({"volumes": "data"}, "data"),
        ({"volumes": "data:/proc/x"}, "/proc"), ({"volumes": "data:/x:nocopy"}, "no_copy"), ({"volumes": "data:/x:tea"}, "tea"),
        ({"networks": "app", "volumes": "data:/y;data:/dev"}, "/dev"), ({"networks": "app", "volumes": "data:/x/../y"}, ".."),
    ):  # fmt: skip
        told = runtime.run("bad", {f"io.netstore.{key}": text for key, text in asked.items()}, check=False)
        assert "netstore: " in told, (asked, told)
        assert said in told, (asked, told)
        runtime.delete("bad")
        assert left(node) == before, asked
    assert "host" in runtime.run(
        "bad", {"io.netstore.networks": "app"}, linux={"namespaces": [{"type": "mount"}]}, check=False
    )
    told = runtime.run("late", {"io.netstore.networks": "app"}, hooks=hooks(node, "poststart"), check=False)
    assert "poststart" in told + runtime("state", "late", check=False).stdout + node.log()
    runtime.delete("late")
    runtime.delete("first")
    assert left(node) == []
    node.stop()
    runtime.run("free", {"other": "x"})  # who asks for nothing needs no netstored
    assert "is it running" in runtime.run("bad", {"io.netstore.networks": "app"}, check=False)
    node.start_resolver()
    node.start()


def test_links_in_the_image(runtime: Runtime) -> None:
    """A target whose way is a link is made in the container's root, never in the host's."""
    node, outside = runtime.node, runtime.node.place / "outside"
    outside.mkdir()
    rootfs = runtime.bundle("web", {}) / "rootfs"
    (rootfs / "link").symlink_to(outside)
    (rootfs / "up").symlink_to("../../../../../../../../etc")
    told = runtime.run("web", {"io.netstore.volumes": "data:/up/no;data:/link/made"}, check=False)
    assert "a link to nowhere" in told
    runtime.delete("web")
    assert not (rootfs / "etc/no").exists()  # what was made for the first went with it
    (rootfs / str(outside).lstrip("/")).mkdir(parents=True)
    runtime.run("web", {"io.netstore.volumes": "data:/up/also;data:/link/made", "io.netstore.networks": "app"})
    assert list(outside.iterdir()) == []
    assert not Path("/etc/also").exists()
    assert (rootfs / "etc/also").is_dir()
    assert (rootfs / str(outside).lstrip("/") / "made").is_dir()
    runtime.exec("web", "/bin/sh", "-c", "echo x > /etc/also/file")
    assert runtime.exec("web", "/bin/cat", f"{outside}/made/file") == "x\n"
    runtime.delete("web")
    assert left(node) == []


def test_poststop_never_comes(runtime: Runtime) -> None:
    """Without poststop, or with netstored away meanwhile, what was attached goes all the same; so does an earlier run's."""
    node, asked = runtime.node, {"io.netstore.networks": "app,ip=10.1.0.5", "io.netstore.volumes": "data:/x"}
    node.cli("volume", "create", "other")
    started = hooks(node, "createRuntime")
    runtime.run("web", asked, hooks=started)
    runtime.delete("web")
    node.cli("system", "check", "--repair")  # what is done once a minute
    assert left(node) == []
    assert f"{node.place}/state" not in node.host.sh("findmnt -rno TARGET")
    runtime.run("web", asked, hooks=started)
    runtime.delete("web")
    runtime.run("web", asked, hooks=started)  # at once
    runtime.delete("web")
    node.cli("volume", "rm", "data")  # nobody uses it
    node.cli("volume", "create", "-d", "image", "-o", "size=32M", "data")
    runtime.run("web", asked)
    node.kill()
    runtime.exec("web", "/bin/touch", "/x/file")
    runtime.delete("web")
    node.start()
    assert left(node) == []
    runtime.run("web", asked)
    node.kill()
    node.start()
    assert node.out("system", "check") == "kernel and store agree"
    runtime.exec("web", "/bin/touch", "/x/more")
    runtime.delete("web")
    assert left(node) == []


def test_one_namespace_of_two(runtime: Runtime) -> None:
    """A container in another's namespace has volumes of its own, and may not name the other's network."""
    node = runtime.node
    kubernetes = {
        "io.kubernetes.cri.sandbox-id": "pod",
        "io.netstore.networks": "app",
        "io.netstore.volumes": "data:/x",
    }
    runtime.run("pod", kubernetes | {"io.kubernetes.cri.container-type": "sandbox"})
    assert node.out("volume", "mounts", "-q") == ""
    shared = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
    inside = {"linux": {"namespaces": [*shared, {"type": "network", "path": f"/proc/{runtime.pid('pod')}/ns/net"}]}}
    told = runtime.run("bad", {"io.netstore.networks": "app,alias=x"}, check=False, **inside)
    assert "is attached to network app already" in told
    runtime.delete("bad")
    assert "somebody else" in runtime.run(
        "pod2", {"io.netstore.networks": "app", "io.netstore.name": "pod"}, check=False, **inside
    )
    runtime.delete("pod2")
    kubernetes["io.kubernetes.cri.container-type"] = "container"
    runtime.run(
        "part", kubernetes, process={"args": ["/bin/sleep", "1000"], "cwd": "/", "user": {"uid": 0, "gid": 0}}, **inside
    )
    assert len(node.out("endpoint", "ls", "-q").split()) == 1
    runtime.exec("part", "/bin/touch", "/x/file")
    runtime.delete("part")
    assert node.out("volume", "mounts", "-q") == ""
    assert "eth0" in runtime.exec("pod", "/bin/ip", "link")
    runtime.delete("pod")
    assert left(node) == []


def spoken(node: Node, stage: str, state: object) -> bytes:
    """Return a call as the program sends it."""
    return f"HOOK_COMMAND={stage}\0\0".encode() + json.dumps(state).encode()


def called(node: Node, stage: str, body: str) -> str:
    """Call the program with a state that no runtime wrote; returns what it says."""
    command = node.host.command(str(HOOK), "--socket", f"{node.place}/run/hook.sock", stage)
    return subprocess.run(command, input=body, capture_output=True, text=True, timeout=50).stderr


@pytest.fixture
def sleeper(node: Node) -> Iterator[int]:
    """A process in namespaces of its own, and a network and a volume for it."""
    node.cli("network", "create", "--subnet", "10.1.0.0/24", "app")
    node.cli("volume", "create", "data")
    (node.place / "config.json").write_text('{"root": {"path": "/"}}')
    process = subprocess.Popen(node.host.command("unshare", "-nm", "sleep", "infinity"))
    wait_until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n", what="the process")
    yield process.pid
    process.kill()
    process.wait()


def test_wrong_states(node: Node, sleeper: int) -> None:
    """Each wrong call is told, naming what is wrong, and leaves nothing."""
    good = {"ociVersion": "1.0.0", "id": "x", "pid": sleeper, "bundle": str(node.place), "status": "creating",
            "annotations": {"io.netstore.networks": "app"}}  # fmt: skip
    text = json.dumps(good)
    for body in ("{io.netstore.", text[:-1], f"[{text}]", text + "{}", "[" * 100_000 + "io.netstore.",
                 text.replace('"x"', "7"), text.replace('"x"', '""'), text.replace(str(node.place), "bundle")):  # fmt: skip
        assert "state is not accepted" in called(node, "createRuntime", body), body[:80]
    assert "MiB" in called(node, "createRuntime", text[:-1] + " " * 10_000_000 + "}")
    for stage in ("startContainer", "x" * 300, "é"):
        assert "no stage of ours" in called(node, stage, text)
    for keys, said in (
        ({"pid": 0}, "no pid"), ({"pid": -1}, "pid"), ({"pid": 4194305}, "no such process"),
        ({"annotations": {"io.netstore.volumes": "data:/mnt"}, "bundle": "/none"}, "/none/config.json"),
        ({"annotations": {"io.netstore.volumes": "data:/mnt"}, "bundle": "/proc/self/fd"}, "/proc/self/fd/config.json"),
        ({"annotations": {"io.netstore.networks": 7}}, "annotations"), ({"annotations": {"io.netstore.": "x"}}, "io.netstore."),
    ):  # fmt: skip
        told = called(node, "createRuntime", json.dumps(good | keys))
        assert said in told, (keys, told)
        assert len(told) < 1000
    for body in ("{}", '{"root": 7}', "x" * 5_000_000, "\0"):
        (node.place / "config.json").write_text(body)
        asked = good | {"annotations": {"io.netstore.volumes": "data:/mnt", "io.netstore.networks": "app"}}
        assert "config.json" in called(node, "createRuntime", json.dumps(asked))
        assert left(node) == []
    assert called(node, "createRuntime", "no annotation of ours") == called(node, "poststop", text) == ""
    assert "usage" in called(node, "--help", "")


async def test_a_thousand_at_once(node: Node, sleeper: int) -> None:
    """Each of a thousand callers who listens gets an answer; afterwards poststop takes all away."""

    def state(name: str, pid: int) -> dict[str, object]:
        asked = {"io.netstore.networks": f"app,alias={name}", "io.netstore.volumes": f"data:/mnt/{name}"}
        return {"id": name, "pid": pid, "bundle": str(node.place), "annotations": asked}

    def draw() -> bytes:
        name, stage = random.choice("abc"), random.choice(("createRuntime", "createRuntime", "poststop", "x"))
        return spoken(node, stage, state(name, random.choice((sleeper, sleeper, 4194305))))

    for told in await storm(f"{node.place}/run/hook.sock", draw):
        assert told[:1] == b"0" or (told[:1] == b"1" and len(told) > 10), told
    for name in "abc":
        assert called(node, "poststop", json.dumps(state(name, 0))) == ""
    assert node.out("endpoint", "ls", "-q") == ""
    assert "defect" not in node.log()


def test_killed_in_between(node: Node, busybox_tar: Path) -> None:
    """netstored is killed while containers come: each is refused or whole, and nothing is left of them."""
    node.cli("network", "create", "--subnet", "10.1.0.0/24", "app")
    node.cli("volume", "create", "data")
    runtime = Runtime(node, "crun", busybox_tar)
    asked = {"io.netstore.networks": "app", "io.netstore.volumes": "data:/x"}
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(runtime.run, f"c{number}", asked, check=False) for number in range(8)]
        wait_until(lambda: any(call.done() for call in calls), seconds=40, what="the first")
        node.kill()
        told = [call.result() for call in calls]
    assert all(not each or "is it running" in each or "before it answered" in each for each in told), told
    node.start()
    for number, each in enumerate(told):
        if not each:
            runtime.exec(f"c{number}", "/bin/touch", f"/x/{number}")
            assert "eth0" in runtime.exec(f"c{number}", "/bin/ip", "link")
    runtime.clean()
    node.cli("system", "check", "--repair")
    assert left(node) == []
