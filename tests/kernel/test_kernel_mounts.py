"""Mounts: the overlay of a kernel before 6.8 makes the same filesystem as the newer one's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import Host

CODE = """
import os, sys
from pathlib import Path
from netstore.kernel import mounts
place = Path(sys.argv[1])
for name in ("top", "bottom", "diff", "work", "root"):
    (place / name).mkdir()
(place / "bottom/file").write_text("bottom")
(place / "top/file").write_text("top")
(place / "bottom/other").write_text("other")
layers, diff, work = [place / "top", place / "bottom"], place / "diff", place / "work"
if sys.argv[2] == "overlay":
    mount = mounts.overlay(layers, diff, work)
else:
    mount = mounts._overlay_by_page(layers, [("upperdir", diff), ("workdir", work)], place / "mounting", 0)
assert not mounts.is_mount_point(place / "root")
mounts.attach(mount, place / "root")
assert mounts.is_mount_point(place / "root")
(place / "root/new").write_text("new")
print((place / "root/file").read_text(), (place / "root/other").read_text(), (place / "diff/new").read_text())
os.close(mount)
mounts.unmount(place / "root")
print(sorted(os.listdir(place)), mounts.is_mount_point(place / "root"))
"""


def test_both_ways_to_stack_layers(host: Host, place: Path) -> None:
    printed = {}
    for way in ("overlay", "_overlay_by_page"):
        (place / way).mkdir()
        command = host.command(sys.executable, "-c", CODE, str(place / way), way)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        printed[way] = done.stdout + done.stderr
    assert set(printed.values()) == {"top other new\n['bottom', 'diff', 'root', 'top', 'work'] False\n"}, printed


HOT = """
import atexit, errno, os, subprocess, sys
from pathlib import Path
from netstore.errors import InvalidArgument, KernelError
from netstore.kernel import mounts
from netstore.kernel.mountns import MountNamespace

place = Path(sys.argv[1])
for name in ("root", "one", "two"):
    (place / name).mkdir()
    (place / name / "name").write_text(name)
script = f'''
mount --bind {place}/root {place}/root; cd {place}/root; mkdir bin proc; cp /bin/busybox bin; ln -s /in/side link
ln -s /proc/self/root/etc escape; ln -s nowhere dangling
mount -t proc proc proc; mkdir old; pivot_root . old; ./bin/busybox umount -l /old; echo; exec ./bin/busybox sleep 100
'''
sleeper = subprocess.Popen(["unshare", "-m", "--propagation", "private", "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
sleeper.stdout.read(1)
inside = Path(f"/proc/{sleeper.pid}/root")

def tree(name):
    source = os.open(place / name, os.O_PATH)
    copy = mounts.clone(source, name)
    os.close(source)
    return copy

def refusal(work, *args, **kwargs):
    try:
        work(*args, **kwargs)
    except (KernelError, InvalidArgument) as error:
        return errno.errorcode[error.errno] if isinstance(error, KernelError) else error.reason

def give(work, name, *args):
    mount = tree(name)  # an open one keeps the mount busy
    try:
        work(mount, *args)
    finally:
        os.close(mount)

atexit.register(sleeper.kill)
with MountNamespace.of_process(sleeper.pid) as there, MountNamespace.at(f"/proc/{sleeper.pid}/ns/mnt") as by_path:
    assert there.inode == by_path.inode
    found = there.look("/a/b")
    assert (found.missing, found.mount) == (("/a", "/a/b"), 0), found
    give(there.attach, "one", "/a/b", found.missing)
    assert (inside / "a/b/name").read_text() == "one"
    found = by_path.look("/a/b")
    assert found.mount and found.path == "/a/b" and not found.read_only
    there.set_read_only("/a/b", read_only=True)
    assert there.look("/a/b").read_only
    give(there.exchange, "two", "/a/b")
    assert (inside / "a/b/name").read_text() == "two" and not there.look("/a/b").read_only
    busy = os.open(inside / "a/b/name", os.O_RDONLY)
    assert refusal(there.detach, "/a/b") == "EBUSY"
    os.close(busy)
    assert there.detach("/a/b", made=("/a", "/a/b")) and not (inside / "a").exists()
    assert not there.detach("/a/b")
    # What is made is a file where the source is one; what cannot be made leaves nothing.
    give(there.attach, "one/name", "/f", ("/f",))
    assert (inside / "f").read_text() == "one" and by_path.detach("/f", made=("/f",)) and not (inside / "f").exists()
    assert refusal(give, there.attach, "two", "/name", ()) == "ENOTDIR"
    assert refusal(give, there.attach, "two", "/x/name/y", ("/x", "/x/name", "/x/name/y", "/proc/no")) and not (inside / "x").exists()
    # One over another, as an exchange that was cut short leaves it.
    give(there.attach, "one", "/s", ("/s",))
    assert not there.is_stacked("/s") and not by_path.is_stacked("/")
    give(there.attach, "two", "/s")
    assert there.is_stacked("/s") and by_path.is_stacked("/s")
    assert there.detach("/s") and there.detach("/s", made=("/s",)) and not there.look("/s").mount
    # Links stay inside; magic ones, and those to nowhere, are refused.
    (inside / "in").mkdir(); (inside / "in/side").mkdir()
    give(there.attach, "two", "/../../link")
    assert there.look("/link").path == "/in/side" and there.detach("/link", lazy=True)
    assert refusal(there.look, "/escape/passwd") == "ELOOP"
    assert refusal(there.look, "/proc/self/root/etc") in ("ELOOP", None)
    assert refusal(give, there.attach, "two", "/dangling", there.look("/dangling").missing) == "EEXIST"
    # A working directory inside keeps it busy, and is named.
    give(there.attach, "one", "/in/side")
    sitter = subprocess.Popen(["nsenter", "-t", str(sleeper.pid), "-m", "-r", "/bin/busybox", "sh", "-c",
                               "cd /in/side; echo; exec /bin/busybox sleep 100"], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)
    atexit.register(sitter.kill)
    sitter.stdout.read(1)
    assert refusal(there.detach, "/in/side") == "EBUSY"
    assert there.holders("/in/side") == [f"busybox (pid {sitter.pid})"], there.holders("/in/side")
    assert there.detach("/in/side", lazy=True) and not there.look("/in/side").mount
    sitter.kill(); sitter.wait()
assert refusal(MountNamespace.of_process, os.getpid()) == "HOST_NAMESPACE"
assert refusal(MountNamespace.of_process, 0) == "NOT_A_NAMESPACE"
for path in ("/proc/self/ns/mnt", f"/proc/{sleeper.pid}/ns/net", "/dev/zero", "/nosuch", "a\\0b"):
    assert refusal(MountNamespace.at, path) == "NOT_A_NAMESPACE", path
assert sorted(os.listdir(place / "root")) == ["bin", "dangling", "escape", "in", "link", "name", "old", "proc"]
print("done")
"""


def test_mounts_in_another_namespace(host: Host, place: Path) -> None:
    done = host.run(sys.executable, "-c", HOT, str(place), check=False)
    assert done.stdout == "done\n", done.stderr
