"""The tar reader: what GNU tar and Python write, and what strangers write."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netstore.archive import unpack
from netstore.errors import InvalidArgument
from netstore.kernel.files import remove_tree
from netstore.kernel.paths import closing


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o755
    return info, data


def extract(data: bytes, root: Path, *, whiteouts: bool = False):
    root.mkdir(exist_ok=True)
    with closing(os.open(root, os.O_RDONLY | os.O_DIRECTORY)) as descriptor:
        return unpack(io.BytesIO(data), descriptor, whiteouts=whiteouts)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "a/b").mkdir(parents=True)
    (root / "a/file").write_bytes(os.urandom(300_000))
    os.link(root / "a/file", root / "a/hard")
    (root / "a/link").symlink_to("/etc/passwd")
    (root / ("long" * 40)).write_text("long name")
    (root / "a/b/setuid").write_text("x")
    (root / "a/b/setuid").chmod(0o4755)
    os.chown(root / "a/b", 1234, 5678)
    os.setxattr(root / "a/file", "user.note", b"kept")
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize("form", ["gnu", "pax"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, lambda data: zstandard.compress(data)])
def test_round_trip_with_gnu_tar(tree: Path, tmp_path: Path, form: str, compress) -> None:
    flags = ["--xattrs"] if form == "pax" else []
    plain = subprocess.run(["tar", "-C", tree, f"--format={form}", *flags, "-c", "."], capture_output=True, check=True)
    target = tmp_path / "target"
    result = extract(compress(plain.stdout), target)
    assert result.digest == hashlib.sha256(plain.stdout).hexdigest()
    assert (target / "a/file").read_bytes() == (tree / "a/file").read_bytes()
    assert (target / "a/file").stat().st_ino == (target / "a/hard").stat().st_ino
    assert os.readlink(target / "a/link") == "/etc/passwd"
    assert stat.S_IMODE((target / "a/b/setuid").stat().st_mode) == 0o4755
    assert ((target / "a/b").stat().st_uid, (target / "a/b").stat().st_gid) == (1234, 5678)
    assert int((target / "a").stat().st_mtime) == int((tree / "a").stat().st_mtime)
    assert (target / ("long" * 40)).exists()
    assert stat.S_ISFIFO((target / "pipe").stat().st_mode)
    if form == "pax":
        assert os.getxattr(target / "a/file", "user.note") == b"kept"


@pytest.mark.parametrize(
    "members",
    [
        [member("../evil", data=b"x")],
        [member("a/../../evil", data=b"x")],
        [member("h", tarfile.LNKTYPE, "../../etc/passwd")],
    ],
)
def test_escapes_are_refused(tmp_path: Path, members: list) -> None:
    with pytest.raises(InvalidArgument) as caught:
        extract(archive(*members), tmp_path / "root")
    assert caught.value.reason == "ARCHIVE_ESCAPE"


@pytest.mark.parametrize("target", ["/outside", "../outside", "../../../../../../outside"])
def test_nothing_is_written_through_a_link_to_outside(tmp_path: Path, target: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    data = archive(member("way", tarfile.SYMTYPE, target), member("way/evil", data=b"x"))
    with pytest.raises(InvalidArgument) as caught:
        extract(data, tmp_path / "root")
    assert caught.value.reason == "ARCHIVE_ESCAPE"
    assert list(outside.iterdir()) == []
    assert not Path("/outside").exists()


def test_a_file_replaces_a_link_instead_of_following_it(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    extract(archive(member("f", tarfile.SYMTYPE, str(victim)), member("f", data=b"theirs")), tmp_path / "root")
    assert victim.read_text() == "mine"
    assert (tmp_path / "root/f").read_bytes() == b"theirs"


def test_linked_parents_stay_inside(tmp_path: Path) -> None:
    data = archive(
        member("usr/bin", tarfile.DIRTYPE), member("bin", tarfile.SYMTYPE, "/usr/bin"), member("bin/x", data=b"1")
    )
    extract(data, tmp_path / "root")
    assert (tmp_path / "root/usr/bin/x").read_bytes() == b"1"


def test_whiteouts_become_overlays(tmp_path: Path) -> None:
    data = archive(member("d", tarfile.DIRTYPE), member("d/.wh..wh..opq"), member(".wh.gone"))
    extract(data, tmp_path / "root", whiteouts=True)
    assert os.getxattr(tmp_path / "root/d", "trusted.overlay.opaque") == b"y"
    status = (tmp_path / "root/gone").stat()
    assert stat.S_ISCHR(status.st_mode)
    assert status.st_rdev == 0


def pax(kind: bytes = tarfile.REGTYPE, link: str = "", **records: str) -> bytes:
    """One member whose pax header says what Python's own archives never do."""
    info = tarfile.TarInfo("f")
    info.type, info.linkname, info.pax_headers = kind, link, {k.replace("__", "."): v for k, v in records.items()}
    return info.tobuf(tarfile.PAX_FORMAT) + bytes(1024)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (pax(mtime="nan"), "time"), (pax(mtime="inf"), "time"), (pax(mtime="1e30"), "time"), (pax(uid="-2"), "owner"),
        (pax(gid=str(2**32)), "owner"), (pax(size="-5"), "size"), (pax(tarfile.SYMTYPE, "x", linkpath="a\0b"), "link"),
        (pax(tarfile.SYMTYPE), "link"), (pax(SCHILY__xattr__user="x", **{"SCHILY.xattr.a\0b": "x"}), "extended attribute"),
        (pax(path="n" * 5000), "a name that is too long"), (pax(path="n" * (1 << 20)), "extended headers of 1048"),
    ],
)  # fmt: skip
def test_what_no_system_call_takes_is_damage(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as caught:
        extract(data, tmp_path / "root")
    assert caught.value.reason == "ARCHIVE_DAMAGED"


def test_headers_for_all_members_are_not_kept_without_end(tmp_path: Path) -> None:
    header = member("g", tarfile.XGLTYPE, data=b"")[0]
    records = [f" key{number}={'x' * 300_000}\n".encode() for number in range(4)]
    bodies = [str(len(each) + 6).encode() + each for each in records]
    data = b""
    for body in bodies:
        header.size = len(body)
        data += header.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)
    assert extract(data[: 3 * len(data) // 4] + bytes(1024), tmp_path / "root").count == 0
    with pytest.raises(InvalidArgument, match="extended headers of 1200"):
        extract(data + bytes(1024), tmp_path / "root")


def test_a_deep_name_is_made(tmp_path: Path) -> None:
    extract(archive(member("/".join("d" * 1500), data=b"x")), tmp_path / "root")
    assert (tmp_path / "root" / "/".join("d" * 1500)).read_bytes() == b"x"
    remove_tree(tmp_path / "root")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 20_000), compress=st.booleans())
def test_truncated_archives_are_named_with_their_offset(tmp_path_factory, cut: int, compress: bool) -> None:
    whole = archive(member("a", data=os.urandom(9000)), member("b", data=os.urandom(5000)))
    data = gzip.compress(whole) if compress else whole
    if cut >= len(data.rstrip(b"\0")):
        return
    with pytest.raises(InvalidArgument) as caught:
        extract(data[:cut], tmp_path_factory.mktemp("root"))
    assert caught.value.reason == "ARCHIVE_DAMAGED"
    assert "offset" in caught.value.metadata


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=3000))
def test_noise_is_refused_and_nothing_else(tmp_path_factory, data: bytes) -> None:
    try:
        extract(data, tmp_path_factory.mktemp("root"))
    except InvalidArgument as error:
        assert error.reason in ("ARCHIVE_DAMAGED", "ARCHIVE_ESCAPE")


def numbered(kind: bytes, size: bytes) -> bytes:
    """Return a header whose size is whatever is written there."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157] = size.ljust(12, b"\0"), kind
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 8 * 32)
    return bytes(block)


class Careful(io.BytesIO):
    """A stream that is never asked for all that it has: of a small archive that may be more than the memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert size > 0
        return super().read(size)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K", b"0"])
@pytest.mark.parametrize("size", [b"-0000000001", b"-0000000777"])
def test_a_member_of_less_than_nothing(tmp_path: Path, kind: bytes, size: bytes) -> None:
    source = Careful(numbered(kind, size) + bytes(4096))
    with (
        closing(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)) as root,
        pytest.raises(InvalidArgument, match="octal") as refused,
    ):
        unpack(source, root)
    assert refused.value.reason == "ARCHIVE_DAMAGED"


def test_a_pax_length_of_thousands_of_digits(tmp_path: Path) -> None:
    record = b"9" * 5000 + b" path=y\n"
    data = numbered(b"x", b"%011o" % len(record)) + record.ljust(10 * 512, b"\0") + bytes(1024)
    with pytest.raises(InvalidArgument, match="length is wrong"):
        extract(data, tmp_path / "out")


def test_a_link_that_takes_a_members_place_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has the volume mounted may exchange what was just made: no file outside gets the archive's mode."""
    outside, chown = tmp_path / "outside", os.chown
    outside.touch(mode=0o600)

    def exchange(name: str, uid: int, gid: int, *, dir_fd: int, follow_symlinks: bool) -> None:
        chown(name, uid, gid, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
        if name == "file":
            os.unlink(name, dir_fd=dir_fd)
            os.symlink(outside, name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "chown", exchange)
    extract(archive(member("file", data=b"x")), tmp_path / "out")
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600
