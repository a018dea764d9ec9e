"""Docker's mounts, and ours, in real containers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conftest import Node, wait_until

from netstore.api.v1 import mount_pb2
from netstore.client import BlockingClient as Client


def mount_line(node: Node, target: str, *flags: str, image: str) -> str:
    """What a container with these flags says of the mount at `target`."""
    lines = node.out("run", "--rm", *flags, image, "sh", "-c", "while read l; do echo $l; done </proc/self/mountinfo")
    return next(line for line in lines.splitlines() if line.split()[4] == target)


def status(node: Node, name: str) -> list[dict[str, object]]:
    found = json.loads(node.out("inspect", name))[0]["status"].get("mounts", [])
    return sorted(found, key=lambda mount: mount["target"])


def test_flags_of_a_mount(node: Node, image: str) -> None:
    options = mount_line(node, "/v", "-v", "data:/v:ro,noexec,nosuid,nodev", image=image).split()[5].split(",")
    assert {"ro", "noexec", "nosuid", "nodev"} <= set(options)
    assert "ro" not in mount_line(node, "/v", "-v", "data:/v:z", image=image).split()[5].split(",")
    refused = node.cli("run", "--rm", "-v", "data:/v:ro", image, "touch", "/v/x", check=False)
    assert "Read-only" in refused.stderr
    node.cli("run", "--rm", "--mount", "source=data,target=/v,noexec", image, "sh", "-c", "echo 'echo hi' > /v/s")


def test_a_mount_on_etc_keeps_the_containers_own_files(node: Node, image: str) -> None:
    hosts = (
        "--add-host",
        "told:192.0.2.7",
        "--hostname",
        "h",
        image,
        "cat",
        "/etc/hosts",
        "/etc/hostname",
        "/etc/resolv.conf",
    )
    for mount in (["-v", "etc:/etc"], ["-v", "etc:/etc:ro"], ["--tmpfs", "/etc"]):
        shown = node.out("run", "--rm", *mount, *hosts)
        assert "192.0.2.7\ttold" in shown, mount
        assert "nameserver" in shown
    # Where nothing can be made the container has what it asked for.
    assert node.out("run", "--rm", "-v", "empty:/etc:ro,nocopy", image, "ls", "/etc") == ""


def test_subpaths(node: Node, image: str) -> None:
    inside = "ls /v; echo top > /v/f; ln -s /etc /v/away; ln -s sub /v/near; ln -s ../../.. /v/up"
    node.cli(
        "run", "--rm", "-v", "data:/v", image, "sh", "-c", f"/bin/busybox mkdir -p /v/sub; echo x > /v/sub/y; {inside}"
    )
    mount = "source=data,target=/v,volume-subpath="
    assert node.out("run", "--rm", "--mount", f"{mount}sub", image, "cat", "/v/y") == "x"
    assert node.out("run", "--rm", "--mount", f"{mount}near", image, "cat", "/v/y") == "x"
    assert node.out("run", "--rm", "--mount", f"{mount}sub/y", image, "cat", "/v") == "x"
    for path, words in {
        "away": "leads out",
        "up": "leads out",
        "nosuch": "does not exist",
        "f/x": "does not exist",
    }.items():
        refused = node.cli("run", "--rm", "--mount", f"{mount}{path}", image, "true", check=False)
        assert words in refused.stderr, (path, refused)
        assert path in refused.stderr
    assert node.out("ps", "-aq") == ""


def test_files_and_directories_that_do_not_fit(node: Node, image: str) -> None:
    file = node.place / "file"
    file.write_text("x")
    node.cli("run", "--rm", "-v", "data:/d", image, "touch", "/d/file")
    for flags, words in {
        ("-v", f"{file}:/etc"): f"spec.mounts[0].target: /etc is a directory in the container, and {file} is a file",
        ("-v", f"{node.place}:/etc/passwd"): f"/etc/passwd is a file in the container, and {node.place} is a directory",
        ("-v", f"{node.place}:/etc/passwd/x"): "/etc/passwd/x is beneath a file",
        ("-v", "data:/d", "-v", f"{node.place}:/d/file"): "spec.mounts[1].target: /d/file is a file",
        ("-w", "/etc/passwd"): "spec.working_dir: /etc/passwd is a file",
        ("-v", "data:/d", "-w", "/d/file"): "spec.working_dir: /d/file is a file",
        ("-v", f"{file}:/new", "-w", "/new"): "spec.working_dir: /new is a file",
    }.items():
        refused = node.cli("run", "--rm", *flags, image, "true", check=False)
        assert (refused.returncode, words in refused.stderr) == (125, True), (flags, refused.stderr)
        assert "hint:" in refused.stderr
        assert "rootfs" not in refused.stderr
    assert node.out("run", "--rm", "-v", f"{file}:/new/file", "-w", "/made", image, "cat", "/new/file") == "x"
    assert node.out("ps", "-aq") == ""


def test_binds_beneath_binds(node: Node, image: str) -> None:
    top = node.place / "top"
    top.mkdir()
    node.host.sh(f"mkdir {top}/inner; mount -t tmpfs t {top}/inner; touch {top}/inner/file")
    writing = ["sh", "-c", "touch /b/inner/new 2>/dev/null && echo written; ls /b/inner"]

    def run(more: str) -> list[str]:
        mount = f"type=bind,source={top},target=/b{more}"
        return node.out("run", "--rm", "--mount", mount, image, *writing).split()

    assert run("") == ["written", "file", "new"]
    assert run(",ro") == ["file", "new"]
    assert run(",readonly,bind-recursive=readonly") == ["file", "new"]
    assert run(",ro,bind-recursive=writable") == ["written", "file", "new"]
    assert run(",bind-recursive=disabled")[:1] == ["written"]  # into the directory below
    assert "inner/file" not in node.out(
        "run", "--rm", "--mount", f"type=bind,source={top},target=/b,bind-recursive=disabled", image, "sh", "-c",
        "echo /b/inner/*",
    )  # fmt: skip
    # The host's mount is where it was: a container's end takes nothing away.
    assert (node.host.sh(f"ls {top}/inner")).split() == ["file", "new"]
    node.host.sh(f"umount {top}/inner")


@pytest.mark.parametrize(
    ("mode", "there", "back"), [("rslave", True, False), ("rshared", True, True), ("", False, False)]
)
def test_propagation(node: Node, image: str, mode: str, there: bool, back: bool) -> None:
    top = node.place / "shared"
    node.host.sh(f"mkdir -p {top}; mount -t tmpfs t {top}; mkdir {top}/late {top}/here")
    refused = node.cli("run", "--rm", "-v", f"{top}:/b:rshared", image, "true", check=False)
    assert "mount --make-shared" in refused.stderr
    node.host.sh(f"mount --make-shared {top}")
    node.cli("run", "-d", "--name", "c", "-v", f"{top}:/b:{mode or 'rprivate'}", image)
    node.host.sh(f"mount -t tmpfs late {top}/late; touch {top}/late/seen")
    assert (node.out("exec", "c", "ls", "/b/late") == "seen") is there
    pid = node.out("inspect", "-f", "{{.Status.Pid}}", "c")
    node.host.run("nsenter", "-t", pid, "-m", "/bin/busybox", "mount", "-t", "tmpfs", "in", "/b/here")
    assert (f"{top}/here" in node.host.sh("cat /proc/self/mountinfo")) is back
    node.cli("rm", "-f", "c")
    assert "seen" in node.host.sh(f"ls {top}/late")
    node.host.sh(f"umount -R {top}")


def test_sources_of_binds(node: Node, image: str) -> None:
    missing = node.place / "made/here"
    refused = node.cli("run", "--rm", "--mount", f"type=bind,source={missing},target=/b", image, "true", check=False)
    assert "does not exist" in refused.stderr
    assert "bind-create-src" in refused.stderr
    node.cli("run", "--rm", "--mount", f"type=bind,source={missing},target=/b,bind-create-src", image, "true")
    assert missing.is_dir()
    node.cli("run", "--rm", "-v", f"{node.place}/other:/b", image, "true")
    assert (node.place / "other").is_dir()
    file = node.place / "file"
    file.write_text("one file\n")
    assert node.out("run", "--rm", "-v", f"{file}:/b:ro", image, "cat", "/b") == "one file"


def test_images_as_mounts(node: Node, image: str) -> None:
    mount = f"type=image,source={image},target=/i"
    assert node.out("run", "-d", "--name", "c", "--mount", mount, image)
    assert node.out("exec", "c", "cat", "/i/data/hello") == "from the image"
    assert node.cli("exec", "c", "touch", "/i/x", check=False).returncode
    part = f"{mount},image-subpath=data/hello"
    assert node.out("run", "--rm", "--mount", part, image, "cat", "/i") == "from the image"
    refused = node.cli("run", "--rm", "--mount", f"{mount},image-subpath=nosuch", image, "true", check=False)
    assert "subpath 'nosuch' of image" in refused.stderr


def test_volumes_from(node: Node, image: str) -> None:
    node.cli("create", "--name", "a", "-v", "data:/v", "-v", f"{node.place}:/host", "-v", "/anonymous", image)
    node.cli("run", "-d", "--name", "b", "--volumes-from", "a:ro", "-v", "other:/v", image)
    found = status(node, "b")
    assert [(m["target"], m.get("read_only", False)) for m in found] == [
        ("/anonymous", True), ("/host", True), ("/v", False)
    ]  # fmt: skip
    assert found[2]["volume"] == "other"
    anonymous = str(found[0]["volume"])
    refused = node.cli("volume", "rm", anonymous, check=False)
    assert "in use by a, b" in refused.stderr
    node.cli("rm", "-v", "a")
    assert anonymous in node.out("volume", "ls", "-q")  # b has it still
    node.cli("rm", "-f", "-v", "b")
    assert anonymous not in node.out("volume", "ls", "-q")


def test_idmaps_and_chown(node: Node, image: str) -> None:
    node.cli("run", "--rm", "-v", "data:/v", image, "sh", "-c", "touch /v/roots; touch /v/mine")
    shown = ["stat", "-c", "%u:%g", "/v/roots"]
    mapped = "data:/v:idmap=uids=0-1000-10;gids=0-2000-10"
    assert node.out("run", "--rm", "-v", mapped, image, *shown) == "1000:2000"
    made = ["sh", "-c", "touch /v/new && stat -c %u /v/new"]
    assert node.out("run", "--rm", "-u", "1000:2000", "-v", mapped, image, *made) == "1000"
    assert node.out("run", "--rm", "-v", "data:/v", image, "stat", "-c", "%u:%g", "/v/new") == "0:0"
    proc = "type=bind,source=/proc,target=/b,idmap=uids=0-1000-10"
    refused = node.cli("run", "--rm", "--mount", proc, image, "true", check=False)
    assert "cannot map ids" in refused.stderr
    assert node.out("run", "--rm", "-u", "app", "-v", "data:/v:U", image, *shown) == "1000:1000"


def test_anonymous_volumes_go_with_rm(node: Node, image: str) -> None:
    node.cli("run", "--rm", "-v", "/anonymous", "--mount", "target=/also", "-v", "named:/n", image, "true")
    assert node.out("volume", "ls", "-q") == "named"


def test_mount_options_of_a_new_volume(node: Node, image: str) -> None:
    node.cli("run", "--rm", "--mount", "source=data,target=/v,volume-label=a=b,volume-driver=local", image, "true")
    assert json.loads(node.out("volume", "inspect", "data"))[0]["labels"] == {"a": "b"}
    assert node.out("run", "--rm", "-v", "none:/data:nocopy", image, "sh", "-c", "echo /data/*") == "/data/*"
    refused = node.cli("run", "--rm", "--volume-driver", "nosuch", "-v", "x:/v", image, "true", check=False)
    assert "nosuch" in refused.stderr


def test_tmpfs(node: Node, image: str) -> None:
    line = mount_line(node, "/t", "--mount", "type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=700", image=image)
    assert {"nosuid", "nodev", "noexec"} <= set(line.split()[5].split(","))
    assert {"size=1024k", "mode=700"} <= set(line.split()[-1].split(","))
    line = mount_line(node, "/t", "--tmpfs", "/t:exec,ro,uid=1000", image=image)
    assert {"nosuid", "nodev", "ro"} <= set(line.split()[5].split(","))
    assert "noexec" not in line


def test_copy_up_under_a_running_container(node: Node, image: str) -> None:
    node.cli("run", "-d", "--name", "first", "-v", "data:/empty", image)
    node.cli("run", "-d", "--name", "second", "-v", "data:/data:rw", image)
    assert node.out("exec", "first", "cat", "/empty/hello") == "from the image"
    node.cli("exec", "first", "touch", "/empty/new")
    assert "new" in node.out("exec", "second", "ls", "/data")


def test_attach_and_detach_while_it_runs(node: Node, image: str) -> None:
    node.cli("volume", "create", "data")
    node.cli("run", "-d", "--name", "c", image)
    refused = node.cli("volume", "attach", "nosuch", "c:/v", check=False)
    assert "no such volume: nosuch" in refused.stderr
    assert node.out("volume", "attach", "data", "c:/a/v") == "c:/a/v"
    node.cli("exec", "c", "sh", "-c", "echo hi > /a/v/f")
    assert node.out("volume", "attach", "data", "c:/a/v") == "c:/a/v"  # once more is a success
    found = status(node, "c")
    assert [(m["target"], m["volume"], m["attached"]) for m in found] == [("/a/v", "data", True)]
    assert "in use by c" in node.cli("volume", "rm", "data", check=False).stderr
    # Read-only at once, and back; a file that is open for writing is named.
    node.cli("volume", "attach", "data", "c:/a/v:ro")
    assert "Read-only" in node.cli("exec", "c", "touch", "/a/v/x", check=False).stderr
    node.cli("volume", "attach", "data", "c:/a/v:rw")
    node.cli("exec", "c", "touch", "/a/v/x")
    # It is there again after a restart.
    node.cli("stop", "-t", "0", "c")
    node.cli("start", "c")
    assert node.out("exec", "c", "cat", "/a/v/f") == "hi"
    # In use: who uses it is said; by force it goes.
    pid = node.out("inspect", "-f", "{{.Status.Pid}}", "c")
    node.host.run(
        "nsenter",
        "-t",
        pid,
        "-m",
        "-r",
        "/bin/busybox",
        "sh",
        "-c",
        "cd /a/v; /bin/sleep 100 </dev/null >/dev/null 2>&1 &",
    )
    refused = node.cli("volume", "detach", "c:/a/v", check=False)
    assert "in use by busybox (pid" in refused.stderr or "in use by sleep (pid" in refused.stderr, refused
    node.cli("volume", "detach", "--force", "c:/a/v")
    assert node.cli("exec", "c", "ls", "/a/v/f", check=False).returncode
    assert status(node, "c") == []
    node.cli("volume", "rm", "data")
    assert "no such mount" in node.cli("volume", "detach", "c:/a/v", check=False).stderr
    told = node.out("events", "--since", "1h", "--until-now", "--filter", "type=volume", "--filter", "name=data")
    assert [line.split()[3] for line in told.splitlines()][:4] == ["create", "mount", "unmount", "mount"]
    assert "place=c,target=/a/v" in told or "target=/a/v" in told


def test_what_was_made_for_a_mount_goes_with_it(node: Node, image: str) -> None:
    node.cli("volume", "create", "data")
    node.cli("run", "-d", "--name", "c", image)
    node.cli("volume", "attach", "data", "c:/made/deep/here:noexec")
    assert "noexec" in next(
        line
        for line in node.out("exec", "c", "cat", "/proc/self/mountinfo").splitlines()
        if " /made/deep/here " in line
    )
    node.cli("volume", "detach", "c:/made/deep/here")
    assert "made" not in node.out("exec", "c", "ls", "/")
    node.cli("volume", "attach", "data", "c:/tmp")
    node.cli("volume", "detach", "c:/tmp")
    assert "tmp" in node.out("exec", "c", "ls", "/")


def test_attach_before_it_runs(node: Node, image: str) -> None:
    node.cli("volume", "create", "data")
    node.cli("create", "--name", "c", image)
    node.cli("volume", "attach", "data", "c:/v:ro")
    node.cli("start", "c")
    assert node.cli("exec", "c", "touch", "/v/x", check=False).returncode
    node.cli("stop", "-t", "0", "c")
    node.cli("volume", "detach", "c:/v")
    node.cli("start", "c")
    assert " /v " not in node.out("exec", "c", "cat", "/proc/self/mountinfo")


def test_targets_that_are_refused(node: Node, image: str) -> None:
    node.cli("volume", "create", "data")
    inside = (
        "ln -s /nowhere /dangling; ln -s /proc/self/root/etc /escape; ln -s ../../../../../tmp /up; exec sleep 1000"
    )
    node.cli("run", "-d", "--name", "c", "-v", "data:/mine", image, "sh", "-c", inside)
    for target, words in {
        "/dangling": "a link to nowhere", "/escape": "a link to nowhere", "/bin/sh/x": "is no directory", "/mine": "already|mounted",
        "/dev": "not netstore's", "/proc/x": "not in /proc", "/": "an absolute path", "/bin/busybox": "no directory",
    }.items():  # fmt: skip
        refused = node.cli("volume", "attach", "--subpath", "", "data", f"c:{target}:nodev", check=False)
        assert refused.returncode, target
        assert any(word in refused.stderr for word in words.split("|")), (target, refused.stderr)
    node.cli("volume", "attach", "data", "c:/up")  # leads to the container's own
    assert " /tmp " in node.out("exec", "c", "cat", "/proc/self/mountinfo")
    assert node.out("system", "check") == "kernel and store agree"


def test_a_volume_is_exchanged_with_no_moment_between(node: Node, client: Client, image: str) -> None:
    for name in ("one", "two"):
        node.cli("run", "--rm", "-v", f"{name}:/v", image, "sh", "-c", f"echo {name} > /v/name")
    reading = "while :; do read n </v/name || echo EMPTY; case $n in one|two) ;; *) echo BAD;; esac; done"
    node.cli("run", "-d", "--name", "c", "-v", "one:/v", image, "sh", "-c", f"exec 9</v/name; {reading}")
    refused = node.cli("volume", "attach", "two", "c:/v", check=False)
    assert "one is mounted there" in refused.stderr
    assert "--replace" in refused.stderr
    pid = node.out("inspect", "-f", "{{.Status.Pid}}", "c")
    for number in range(50):
        name = ("two", "one")[number % 2]
        spec = mount_pb2.MountSpec(source=name, target="/v", read_only=name == "one")
        ref = mount_pb2.MountNamespaceRef(container="c")
        client.mounts.Mount(mount_pb2.MountRequest(namespace=ref, spec=spec, replace=True))
        assert Path(f"/proc/{pid}/root/v/name").read_text() == f"{name}\n"
    assert node.out("logs", "c") == ""
    assert node.cli("volume", "rm", "two").stdout == "two\n"  # nobody uses it any more
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    assert sum(line.split()[4] == "/v" for line in lines) == 1
    node.cli("stop", "-t", "0", "c")
    node.cli("start", "c")
    assert node.cli("exec", "c", "touch", "/v/x", check=False).returncode  # as it was last
    node.cli("kill", "c")


def test_namespaces_of_other_engines(node: Node, image: str) -> None:
    node.cli("run", "--rm", "-v", "data:/v", image, "sh", "-c", "echo hi > /v/f")
    other = subprocess.Popen(
        node.host.command(
            "unshare", "-m", "--propagation", "private", "sh", "-c", "mount -t tmpfs t /mnt; exec sleep 100"
        )
    )
    wait_until(
        lambda: b"sleep" in Path(f"/proc/{other.pid}/cmdline").read_bytes().split(b"\0")[0], what="its namespace"
    )
    pid = str(other.pid)
    assert node.out("volume", "attach", "--pid", pid, "data", "/mnt/new:ro") == f"pid {pid}:/mnt/new"
    inside = ["nsenter", "-t", pid, "-m"]
    assert node.host.run(*inside, "cat", "/mnt/new/f").stdout == "hi\n"
    assert f"in use by process {pid}" in node.cli("volume", "rm", "data", check=False).stderr
    shown = json.loads(node.out("volume", "mounts", "--format", "json"))
    assert [(m["namespace"]["pid"], m["status"]["volume"]) for m in shown] == [(other.pid, "data")]
    assert "/mnt/new" in node.out("volume", "mounts", "--mntns", f"/proc/{pid}/ns/mnt")
    # It is whole after a kill -9, and known; the same namespace goes by its path too.
    node.kill()
    node.host.run(*inside, "umount", "/mnt/new")
    node.start()
    assert node.host.run(*inside, "cat", "/mnt/new/f").stdout == "hi\n"
    node.cli("volume", "detach", "--mntns", f"/proc/{pid}/ns/mnt", "/mnt/new")
    assert node.host.run(*inside, "ls", "/mnt").stdout == ""
    node.cli("volume", "attach", "--mntns", f"/proc/{pid}/ns/mnt", "data", "/mnt/v")
    other.kill()
    other.wait()
    node.cli("volume", "rm", "data")  # what is gone is forgotten
    assert node.out("volume", "mounts", "-q") == ""
    node.cli("volume", "create", "data")
    refused = node.cli("volume", "attach", "--pid", str(node.host.holder), "data", "/v", check=False)
    assert "a process in a mount namespace of its own" in refused.stderr


def test_mounts_of_any_type_through_the_service(node: Node, client: Client, image: str) -> None:
    node.cli("run", "-d", "--name", "c", image)
    (node.place / "dir").mkdir()
    (node.place / "dir/f").write_text("bound\n")
    ref = mount_pb2.MountNamespaceRef(container="c")
    for spec in (
        {"type": mount_pb2.MOUNT_TYPE_BIND, "source": f"{node.place}/dir", "target": "/b"},
        {"type": mount_pb2.MOUNT_TYPE_BIND, "source": f"{node.place}/dir/f", "target": "/file", "read_only": True},
        {
            "type": mount_pb2.MOUNT_TYPE_TMPFS,
            "target": "/t",
            "tmpfs_size_bytes": 1 << 20,
            "tmpfs_options": ["uid=1000"],
        },
        {"type": mount_pb2.MOUNT_TYPE_IMAGE, "source": "bb", "subpath": "data", "target": "/i"},
    ):
        made = client.mounts.Mount(mount_pb2.MountRequest(namespace=ref, spec=spec)).mount
        assert made.status.attached
    assert node.out("exec", "c", "cat", "/b/f", "/file", "/i/hello") == "bound\nbound\nfrom the image"
    assert node.out("exec", "c", "stat", "-c", "%u %a", "/t") == "1000 1777"
    page = client.mounts.ListMounts(mount_pb2.ListMountsRequest(namespace=ref, page_size=3))
    rest = client.mounts.ListMounts(mount_pb2.ListMountsRequest(namespace=ref, page_token=page.next_page_token))
    assert [m.status.target for m in (*page.mounts, *rest.mounts)] == ["/b", "/file", "/t", "/i"]
    assert "is used by c" in node.cli("image", "rm", image, check=False).stderr
    for target in ("/b", "/file", "/t", "/i"):
        client.mounts.Unmount(mount_pb2.UnmountRequest(namespace=ref, target=target))
    client.mounts.Unmount(mount_pb2.UnmountRequest(namespace=ref, target="/b", allow_missing=True))
    assert not {"b", "file", "t", "i"} & set(node.out("exec", "c", "ls", "/").split())


def test_the_owner_of_a_new_volume(node: Node, image: str) -> None:
    node.cli("volume", "create", "-o", "uid=1000", "-o", "gid=2000", "-o", "mode=2750", "data")
    shown = ["stat", "-c", "%u:%g %a", "/data"]
    assert node.out("run", "--rm", "-v", "data:/data:nocopy", image, *shown) == "1000:2000 2750"
    assert node.out("run", "--rm", "-v", "data:/data", image, *shown) == "1000:2000 2750"  # over the image's
    assert node.out("run", "--rm", "-v", "data:/data", image, "cat", "/data/hello") == "from the image"
    node.cli("volume", "create", "--driver", "image", "--size", "16m", "-o", "uid=1000", "small")
    assert node.out("run", "--rm", "-v", "small:/empty", image, "stat", "-c", "%u:%g %a", "/empty") == "1000:0 755"
    new = "source=new,target=/x,volume-opt=uid=1000,volume-opt=mode=700"
    assert node.out("run", "--rm", "-u", "1000", "--mount", new, image, "touch", "/x/mine") == ""
    for options, named in ((["uid=x"], "uid"), (["mode=9"], "mode"), (["type=tmpfs", "device=t", "gid=1"], "gid")):
        flags = [word for option in options for word in ("-o", option)]
        assert f"spec.options[{named}]" in node.cli("volume", "create", *flags, "bad", check=False).stderr
