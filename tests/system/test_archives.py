"""Volumes exported and imported: what is kept, what is refused, what is left when a stream is cut or damaged."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import subprocess
import tarfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from conftest import BIN, Node

from netstore.api.v1 import archive_pb2 as pb
from netstore.client import BlockingClient as Client
from netstore.client import Problem

MIB = 1 << 20


def acl() -> bytes:
    """rw for the owner, r for user 1000 (linux/posix_acl_xattr.h)."""
    entries = ((1, 6, 0xFFFFFFFF), (2, 4, 1000), (4, 4, 0xFFFFFFFF), (0x10, 4, 0xFFFFFFFF), (0x20, 4, 0xFFFFFFFF))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def data_of(node: Node, volume: str) -> Path:
    return Path(node.out("volume", "inspect", "-f", "{{.Status.Mountpoint}}", volume))


def populate(root: Path) -> None:
    (root / "a/b").mkdir(parents=True)
    (root / "a/file").write_bytes(os.urandom(3 * MIB))
    os.link(root / "a/file", root / "a/twin")
    (root / "a/b/link").symlink_to("/etc/passwd")
    os.chown(root / "a/b", 1234, 5678)
    os.setxattr(root / "a/file", "user.mark", b"\0kept")
    os.setxattr(root / "a/file", "system.posix_acl_access", acl())
    with (root / "holes").open("wb") as file:
        for offset in (MIB, 100 * MIB, 900 * MIB):
            file.seek(offset)
            file.write(os.urandom(70_000))
        file.truncate(1024 * MIB)
    (root / "empty-holes").touch()
    os.truncate(root / "empty-holes", 64 * MIB)
    (root / ("long" * 50)).write_text("long")
    os.mkfifo(root / "pipe")
    os.utime(root / "a/file", (1e9, 1e9))


def shape(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and not path.is_symlink() else ""
        xattrs = {
            key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
        }
        found[str(path.relative_to(root))] = (
            status.st_mode, status.st_uid, status.st_gid, int(status.st_mtime), status.st_nlink, digest, xattrs,
            os.readlink(path) if path.is_symlink() else "",
        )  # fmt: skip
    return found


def export(node: Node, volume: str, file: Path, *flags: str) -> str:
    done = node.cli("volume", "export", volume, "-o", str(file), *flags)
    return done.stderr.split()[0].removeprefix("sha256:")


def test_everything_comes_back(node: Node, place: Path) -> None:
    node.cli("volume", "create", "v")
    populate(data_of(node, "v"))
    before = shape(data_of(node, "v"))
    file = place / "v.tar.zst"
    digest = export(node, "v", file)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
    assert file.stat().st_size < 4 * MIB  # holes take no space
    assert node.cli("volume", "import", "copy", str(file), "--sha256", digest).stdout == "copy\n"
    assert shape(data_of(node, "copy")) == before
    assert (data_of(node, "copy") / "holes").stat().st_blocks * 512 < MIB
    # Other tools read it, and it reads theirs.
    (place / "out").mkdir()
    subprocess.run(f"zstd -qdc {file} | tar -C {place}/out -x --xattrs --xattrs-include='*'", shell=True, check=True)
    assert shape(place / "out") == before
    subprocess.run(
        [
            "tar",
            "-C",
            place / "out",
            "--sparse",
            "--xattrs",
            "--xattrs-include=*",
            "--format=posix",
            "-czf",
            place / "by-hand.tgz",
            ".",
        ],
        check=True,
    )
    node.cli("volume", "import", "third", str(place / "by-hand.tgz"), "-d", "image", "--size", "64M")
    node.cli("volume", "clone", "third", "fourth", "-d", "local")
    assert shape(data_of(node, "fourth")) == before
    plain = node.host.sh(
        f"{BIN}/netstore -H {node.address} volume export --compression none v 2>/dev/null | tar -t | sort | head -3"
    )
    assert plain.split() == ["./", "./a/", "./a/b/"]
    assert node.out("system", "check") == "kernel and store agree"


def test_an_export_into_a_pipe_or_a_device_leaves_it_what_it_is(node: Node, place: Path) -> None:
    node.cli("volume", "create", "v")
    pipe = place / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["tar", "--zstd", "-tf", pipe], stdout=subprocess.PIPE, text=True) as reader:
        node.cli("volume", "export", "v", "-o", str(pipe))
        assert reader.communicate()[0] == "./\n"
    assert pipe.is_fifo()
    refused = node.cli("volume", "export", "v", "-o", "/nosuch/file", check=False)
    assert "-o /nosuch/file: No such file or directory" in refused.stderr


def test_an_export_of_a_snapshot_goes_on_where_it_was_cut(node: Node, client: Client, place: Path) -> None:
    for name, flags in (("v", []), ("i", ["-d", "image", "--size", "32M"])):
        node.cli("volume", "create", name, *flags)
        if name == "v":
            populate(data_of(node, "v"))
        node.cli("volume", "snapshot", "create", name, "s")
        whole = b""
        for response in client.archives.ExportVolume(pb.ExportVolumeRequest(volume=name, snapshot="s")):
            whole += response.chunk
            end = response.end
        assert (end.sha256, end.size_bytes) == (hashlib.sha256(whole).hexdigest(), len(whole))
        for offset in (1, len(whole) // 2, len(whole)):
            rest = b"".join(
                each.chunk
                for each in client.archives.ExportVolume(
                    pb.ExportVolumeRequest(volume=name, snapshot="s", offset=offset)
                )
            )
            assert rest == whole[offset:]
    with pytest.raises(grpc.RpcError) as caught:
        list(client.archives.ExportVolume(pb.ExportVolumeRequest(volume="v", offset=5)))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    (data_of(node, "v") / "big").write_bytes(os.urandom(40 * MIB))
    stream = client.archives.ExportVolume(pb.ExportVolumeRequest(volume="v", compression=pb.COMPRESSION_NONE))
    next(stream)
    refused = node.cli("volume", "rm", "v", check=False)
    assert "is being exported" in refused.stderr
    stream.cancel()
    node.cli("volume", "rm", "i")


def sending(
    data: bytes, name: str, upload: str = "", *, offset: int = 0, end: str | None = ""
) -> Iterator[pb.ImportVolumeRequest]:
    yield pb.ImportVolumeRequest(start={"volume": {"name": name}, "upload_id": upload, "offset": offset})
    for position in range(offset, len(data), MIB):
        yield pb.ImportVolumeRequest(chunk=data[position : position + MIB])
    if end is not None:
        yield pb.ImportVolumeRequest(end={"sha256": end})


def nothing_left(node: Node) -> bool:
    volumes = node.place / "state/volumes/local"
    left = [path.name for path in volumes.iterdir() if not path.name.startswith(".")] if volumes.exists() else []
    return not left and not list((node.place / "state/uploads").iterdir()) and node.out("volume", "ls", "-q") == ""


def archive(*members: tuple[str, bytes, int]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, mode in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode = kind, mode
            info.linkname = "/etc" if kind == tarfile.SYMTYPE else ""
            info.devmajor = info.devminor = 1
            tar.addfile(info)
    return buffer.getvalue()


def test_hostile_and_damaged_archives_leave_nothing(node: Node, client: Client, place: Path) -> None:
    node.cli("volume", "create", "v")
    populate(data_of(node, "v"))
    export(node, "v", place / "v.tar.zst")
    node.cli("volume", "rm", "v")
    whole = (place / "v.tar.zst").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    cases = {
        "ends": whole[: len(whole) // 2],
        "sha256 ": bytes(whole[:-10] + b"0123456789"),
        "archive: ": bytes(flipped),
        "escape": archive(("../../escape", tarfile.REGTYPE, 0o644)),
        "'dev'": archive(("dev", tarfile.CHRTYPE, 0o644)),
        "'link'": archive(("link", tarfile.SYMTYPE, 0o777), ("link/file", tarfile.REGTYPE, 0o644)),
        "is not accepted": b"no archive at all" * 100,
        "too early": b"",
    }  # fmt: skip
    for said, data in cases.items():
        with pytest.raises(grpc.RpcError, match=said) as caught:
            client.archives.ImportVolume(sending(data, "x"))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, said
        assert nothing_left(node), said
    with pytest.raises(grpc.RpcError) as caught:
        client.archives.ImportVolume(sending(whole, "x", end="0" * 64))
    assert "sha256" in caught.value.details()
    assert nothing_left(node)
    assert not (place / "escape").exists()


def test_privileges_are_left_out_unless_asked_for(node: Node, client: Client, place: Path) -> None:
    file = place / "a.tar"
    file.write_bytes(
        archive(("su", tarfile.REGTYPE, 0o6755), ("shared", tarfile.DIRTYPE, 0o2775), ("null", tarfile.CHRTYPE, 0o666))
    )
    refused = node.cli("volume", "import", "v", str(file), check=False)
    assert "an archive without devices" in refused.stderr
    node.cli("volume", "import", "kept", str(file), "--keep-privileges")
    assert (data_of(node, "kept") / "su").stat().st_mode & 0o7777 == 0o6755
    assert (data_of(node, "kept") / "null").is_char_device()
    file.write_bytes(archive(("su", tarfile.REGTYPE, 0o6755), ("shared", tarfile.DIRTYPE, 0o2775)))
    node.cli("volume", "import", "v", str(file))
    assert (data_of(node, "v") / "su").stat().st_mode & 0o7777 == 0o755
    assert (data_of(node, "v") / "shared").stat().st_mode & 0o7777 == 0o2775


def test_an_import_goes_on_where_it_was_cut(node: Node, client: Client, place: Path) -> None:
    node.cli("volume", "create", "v")
    populate(data_of(node, "v"))
    before = shape(data_of(node, "v"))
    export(node, "v", place / "v.tar.zst")
    whole = (place / "v.tar.zst").read_bytes()
    upload = str(uuid.uuid4())
    with pytest.raises(grpc.RpcError) as caught:
        client.archives.ImportVolume(sending(whole[: 2 * MIB], "copy", upload, end=None))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    node.kill()
    node.start()
    node.cli("system", "check")
    received = client.archives.GetUpload(pb.GetUploadRequest(upload_id=upload), wait_for_ready=True).received_bytes
    assert received == 2 * MIB
    with pytest.raises(grpc.RpcError) as caught:
        client.archives.ImportVolume(sending(whole, "copy", upload, offset=received + 1))
    assert "0 to 2097152" in Problem.of(caught.value).hint
    made = client.archives.ImportVolume(sending(whole, "copy", upload, offset=received))
    assert made.size_bytes == len(whole)
    assert shape(data_of(node, "copy")) == before
    again = client.archives.ImportVolume(sending(whole, "copy", upload, offset=received))
    assert again.volume.id == made.volume.id
    taken = node.cli("volume", "import", "copy", str(place / "v.tar.zst"), check=False)
    assert "volume copy exists" in taken.stderr


def test_netstored_that_comes_back_is_waited_for(node: Node, place: Path) -> None:
    node.cli("volume", "create", "v")
    (data_of(node, "v") / "big").write_bytes(os.urandom(40 * MIB))
    node.cli("volume", "snapshot", "create", "v", "s")
    script = f"{BIN}/netstore -H {node.address} volume export v@s"
    exporting = subprocess.Popen(
        node.host.command("sh", "-c", f"{script} | {{ head -c 2000000; sleep 2; cat; }} > {place}/out")
    )
    threading.Event().wait(1.5)
    node.kill()
    node.start()
    assert exporting.wait(timeout=30) == 0
    node.cli("volume", "import", "copy", str(place / "out"))
    assert (data_of(node, "copy") / "big").read_bytes() == (data_of(node, "v") / "big").read_bytes()


def test_a_volume_too_small_is_said_and_leaves_nothing(node: Node, place: Path) -> None:
    node.cli("volume", "create", "v")
    (data_of(node, "v") / "big").write_bytes(os.urandom(20 * MIB))
    export(node, "v", place / "v.tar.zst")
    full = node.cli("volume", "import", "tight", str(place / "v.tar.zst"), "-d", "image", "--size", "16M", check=False)
    assert "no space is left" in full.stderr
    assert node.out("volume", "ls", "-q") == "v"
    assert node.out("system", "check") == "kernel and store agree"
