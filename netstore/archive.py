"""Tar archives (POSIX.1-2001 pax, GNU) read as a stream, and unpacked without leaving the root.

Images and volumes come from strangers: names are resolved by openat2 with the target as root, a name with ".." is
refused, nothing is written through a link that leads outside, and damage is reported with its offset.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

import zstandard

from netstore.errors import Exhausted, InvalidArgument, KernelError
from netstore.kernel.paths import open_in_root
from netstore.sparse import Extent, read_map, real_size

__all__ = ["Entry", "Reader", "Unpacked", "compressed", "decompressed", "unpack"]

BLOCK = 512
_CHUNK = 1 << 18
_MAX_HEADER = 1 << 20  # bytes of one pax header or long name; real ones are a few hundred
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"


class Source(Protocol):
    """What bytes are read from."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, b"" at the end."""
        ...


@dataclass(slots=True)
class Entry:
    """One member. `type` is the character of the header; sizes are in bytes; times in seconds."""

    name: str
    type: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime: float
    link: str
    device: tuple[int, int]
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    real_size: int | None = None  # of a sparse file; `size` is what the archive holds of it


def decompressed(source: Source) -> Source:
    """Return the stream itself, or what gzip (RFC 1952) or Zstandard (RFC 8878) hold in it, found by their magic."""
    head = _Head(source)
    if not compressed(magic := head.peek(4)):
        return head
    if magic.startswith(_GZIP):
        return _Gzip(head)
    return zstandard.ZstdDecompressor().stream_reader(head, read_across_frames=True)  # type: ignore[arg-type]


def compressed(magic: bytes) -> bool:
    """Say whether a stream that begins with these bytes is gzip or Zstandard."""
    return magic.startswith((_GZIP, _ZSTD))


class _Head:
    def __init__(self, source: Source) -> None:
        self._source = source
        self._head = b""

    def peek(self, size: int) -> bytes:
        while len(self._head) < size and (more := self._source.read(size - len(self._head))):
            self._head += more
        return self._head

    def read(self, size: int, /) -> bytes:
        if self._head:
            taken, self._head = self._head[:size], self._head[size:]
            return taken
        return self._source.read(size)


class _Gzip:
    """zlib in chunks: the gzip module's file object costs twice the time, and hides truncation until the end."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._inflate = zlib.decompressobj(31)
        self._rest = b""

    def read(self, size: int, /) -> bytes:
        while True:
            if self._inflate.eof:
                following = self._inflate.unused_data or self._source.read(_CHUNK)
                if not following.strip(b"\0"):
                    return b""
                self._inflate, self._rest = zlib.decompressobj(31), following
            chunk = self._rest or self._source.read(_CHUNK)
            data = self._inflate.decompress(chunk, size)
            self._rest = self._inflate.unconsumed_tail
            if data:
                return data
            if not chunk and not self._inflate.eof:
                raise EOFError("the gzip stream ends too early")


class Reader:
    """Members in order. Keeps the offset and the sha256 of all it read, which of a layer is its diff id."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = 0
        self._padding = 0
        self._global: dict[str, bytes] = {}
        self.offset = 0
        self.sha256 = hashlib.sha256()

    def damaged(self, why: str) -> InvalidArgument:
        """Return the error for damage at the present offset."""
        return InvalidArgument(
            "archive", why, "a whole tar archive, plain, gzip or zstd", reason="ARCHIVE_DAMAGED", offset=self.offset
        )

    def _read(self, size: int) -> bytes:
        parts, left = [], size
        while left:
            try:
                part = self._source.read(left)
            except (zlib.error, zstandard.ZstdError, EOFError) as error:
                raise self.damaged(str(error)) from error
            if not part:
                raise self.damaged(f"ends {left} bytes too early")
            self.sha256.update(part)
            self.offset += len(part)
            left -= len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __iter__(self) -> Iterator[Entry]:
        overrides: dict[str, bytes] = {}
        while True:
            self.skip()
            block = self._read(BLOCK)
            if not block.strip(b"\0"):
                self._drain()
                return
            entry = self._header(block)
            self._left, self._padding = entry.size, -entry.size % BLOCK
            if entry.type in "xgLK":
                if entry.size > _MAX_HEADER:
                    raise self.damaged(f"an extended header of {entry.size} bytes")
                data = self._body()
                if entry.type == "g":
                    self._global |= self._pax(data)
                elif entry.type == "x":
                    overrides |= self._pax(data)
                else:
                    overrides["path" if entry.type == "L" else "linkpath"] = data.rstrip(b"\0")
                continue
            self._override(entry, {**self._global, **overrides})
            overrides = {}
            yield entry

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes of the present member, b"" at its end."""
        data = self._read(min(size, self._left)) if self._left else b""
        self._left -= len(data)
        return data

    def sparse_map(self, entry: Entry) -> list[Extent]:
        """Return where the data of a sparse member goes; its body has them one after the other."""
        try:
            return read_map(self.read, entry.real_size or 0, entry.size)
        except ValueError as error:
            raise self.damaged(str(error)) from error

    def skip(self) -> None:
        """Pass over what is left of the present member."""
        while self._left:
            self.read(_CHUNK)
        if self._padding:
            self._read(self._padding)
            self._padding = 0

    def _body(self) -> bytes:
        data = self._read(self._left) if self._left else b""
        self._left = 0
        return data

    def _drain(self) -> None:
        """Read what follows the end mark: it counts for the digest."""
        for _ in self.chunks():
            pass

    def chunks(self) -> Iterator[bytes]:
        """Yield the plain bytes that are left."""
        while True:
            try:
                part = self._source.read(_CHUNK)
            except (zlib.error, zstandard.ZstdError, EOFError) as error:
                raise self.damaged(str(error)) from error
            if not part:
                return
            self.sha256.update(part)
            self.offset += len(part)
            yield part

    def _header(self, block: bytes) -> Entry:
        if self._number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 32:
            raise self.damaged("no tar header (its checksum is wrong)")
        name = _text(block[0:100])
        if block[257:263] == b"ustar\0" and block[345]:
            name = f"{_text(block[345:500])}/{name}"
        kind = chr(block[156]) if block[156] else "0"
        return Entry(
            name=name,
            type="0" if kind == "7" else kind,
            mode=self._number(block[100:108]),
            uid=self._number(block[108:116]),
            gid=self._number(block[116:124]),
            size=self._number(block[124:136]) if kind in "07xgLKS" else 0,
            mtime=self._number(block[136:148]),
            link=_text(block[157:257]),
            device=(self._number(block[329:337]), self._number(block[337:345])),
        )

    def _number(self, raw: bytes) -> int:
        if raw[0] & 0x80:  # GNU base-256
            return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
        try:
            return int(raw.strip(b"\0 ") or b"0", 8)
        except ValueError as error:
            raise self.damaged(f"no octal number: {raw!r}") from error

    def _pax(self, data: bytes) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        while data:
            length_text, _, _ = data.partition(b" ")
            if not length_text.isdigit() or not len(length_text) < int(length_text) <= len(data):
                raise self.damaged("a pax header whose length is wrong")
            record = data[len(length_text) + 1 : int(length_text)].rstrip(b"\n")
            key, _, value = record.partition(b"=")
            found[key.decode(errors="replace")] = value
            data = data[int(length_text) :]
        return found

    def _override(self, entry: Entry, records: Mapping[str, bytes]) -> None:
        try:
            entry.name = os.fsdecode(records.get("path", os.fsencode(entry.name)))
            entry.link = os.fsdecode(records.get("linkpath", os.fsencode(entry.link)))
            entry.uid, entry.gid = int(records.get("uid", entry.uid)), int(records.get("gid", entry.gid))
            entry.mtime = float(records.get("mtime", entry.mtime))
            if "size" in records and entry.type == "0":
                entry.size = int(records["size"])
            entry.real_size = real_size(records)
        except ValueError as error:
            raise self.damaged(f"a pax header: {error}") from error
        if entry.type == "S":
            raise InvalidArgument(
                "archive", entry.name, "sparse members in the pax format: tar --sparse --format=posix"
            )
        entry.name = os.fsdecode(records.get("GNU.sparse.name", os.fsencode(entry.name)))
        prefix = "SCHILY.xattr."
        entry.xattrs = {key[len(prefix) :]: value for key, value in records.items() if key.startswith(prefix)}
        self._left, self._padding = entry.size, -entry.size % BLOCK


def _text(raw: bytes) -> str:
    return os.fsdecode(raw.split(b"\0", 1)[0])


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What an archive was: sha256 of the plain stream (hexadecimal), bytes of its files, number of members."""

    digest: str
    size_bytes: int
    count: int


def unpack(source: BinaryIO | Source, root: int, *, whiteouts: bool = False, harmless: bool = False) -> Unpacked:
    """Unpack a tar stream, compressed or not, into the directory `root`, owners, modes and xattrs kept.

    With `whiteouts`, the marks of OCI layers (image-spec, layer.md) become those of overlayfs. With `harmless`, devices
    are refused, and what gives rights is left out: setuid and setgid of files, capabilities, all xattrs `security.` and
    `trusted.`.

    Raises:
        InvalidArgument: ARCHIVE_DAMAGED with the offset, ARCHIVE_ESCAPE or ARCHIVE_DEVICE with the member.
        Exhausted: no space is left.
    """
    reader = Reader(decompressed(source))
    writer = _Writer(root, whiteouts=whiteouts, harmless=harmless)
    try:
        for entry in reader:
            writer.write(entry, reader)
        writer.finish()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Exhausted("unpacking the archive: no space is left", hint="free some space") from error
        raise KernelError(error.errno or errno.EIO, "unpacking", str(error.filename or "the archive")) from error
    finally:
        writer.close()
    return Unpacked(reader.sha256.hexdigest(), writer.size, writer.count)


class _Writer:
    def __init__(self, root: int, *, whiteouts: bool, harmless: bool) -> None:
        self._root = root
        self._whiteouts = whiteouts
        self._harmless = harmless
        self._parent: tuple[str, int] = ("", os.dup(root))
        self._directory_times: dict[str, float] = {}
        self.size = 0
        self.count = 0

    def close(self) -> None:
        os.close(self._parent[1])

    def write(self, entry: Entry, reader: Reader) -> None:
        """Make one member, in place of what has its name."""
        self.count += 1
        if self._harmless:
            _disarm(entry)
        path = _inside(entry.name)
        parent, _, name = path.rpartition("/")
        if not name:
            self._settle(self._root, ".", entry)
            return
        directory = self._enter(parent)
        if self._whiteouts and name.startswith(_WHITEOUT):
            self._white_out(directory, name)
            return
        if entry.type == "5":
            self._make_directory(directory, name, entry)
        else:
            _clear(directory, name)
            self._make(directory, name, entry, reader)
        if entry.type != "1":
            self._settle(directory, name, entry)
        if entry.type == "5":
            self._directory_times[path] = entry.mtime

    def finish(self) -> None:
        """Set the directories' times, which their members changed."""
        for path, mtime in self._directory_times.items():
            parent, _, name = path.rpartition("/")
            try:
                os.utime(name, (mtime, mtime), dir_fd=self._enter(parent), follow_symlinks=False)
            except FileNotFoundError:  # a later member took its place
                continue

    def _enter(self, path: str) -> int:
        """Return the directory `path`, its links resolved inside the root, missing parts made."""
        if self._parent[0] == path:
            return self._parent[1]
        flags = os.O_RDONLY | os.O_DIRECTORY
        try:
            found = open_in_root(self._root, path or ".", flags)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise self._escape(path, error) from error
            above, _, name = path.rpartition("/")
            try:
                os.mkdir(name, 0o755, dir_fd=self._enter(above))
            except FileExistsError:  # a link to nowhere inside the root
                raise self._escape(path, error) from error
            found = open_in_root(self._root, path, flags)
        os.close(self._parent[1])
        self._parent = (path, found)
        return found

    @staticmethod
    def _escape(path: str, error: KernelError) -> InvalidArgument:
        return InvalidArgument(
            "archive",
            path,
            f"members whose parents are directories ({error.what})",
            reason="ARCHIVE_ESCAPE",
            entry=path,
        )

    def _white_out(self, directory: int, name: str) -> None:
        if name == _OPAQUE:
            os.setxattr(directory, "trusted.overlay.opaque", b"y")
            return
        hidden = name.removeprefix(_WHITEOUT)
        if hidden in ("", ".", ".."):
            raise InvalidArgument("archive", name, "a whiteout that names a file", reason="ARCHIVE_ESCAPE", entry=name)
        _clear(directory, hidden)
        os.mknod(hidden, stat.S_IFCHR, os.makedev(0, 0), dir_fd=directory)

    @staticmethod
    def _make_directory(directory: int, name: str, entry: Entry) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=directory)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=directory)
                os.mkdir(name, 0o700, dir_fd=directory)

    def _make(self, directory: int, name: str, entry: Entry, reader: Reader) -> None:
        match entry.type:
            case "0":
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                target = os.open(name, flags, 0o600, dir_fd=directory)
                try:
                    self._fill(target, entry, reader)
                finally:
                    os.close(target)
            case "1":
                self._link(directory, name, entry)
            case "2":
                os.symlink(entry.link, name, dir_fd=directory)
            case "3" | "4":
                kind = stat.S_IFCHR if entry.type == "3" else stat.S_IFBLK
                os.mknod(name, kind | 0o600, os.makedev(*entry.device), dir_fd=directory)
            case "6":
                os.mkfifo(name, 0o600, dir_fd=directory)
            case _:
                raise InvalidArgument(
                    "archive", entry.name, f"no member of type {entry.type!r}", reason="ARCHIVE_DAMAGED"
                )

    def _fill(self, target: int, entry: Entry, reader: Reader) -> None:
        if entry.real_size is None:
            while data := reader.read(_CHUNK):
                self.size += _write_all(target, data)
            return
        for offset, length in reader.sparse_map(entry):
            os.lseek(target, offset, os.SEEK_SET)
            while length:
                length -= _write_all(target, reader.read(min(length, _CHUNK)))
        os.ftruncate(target, entry.real_size)
        self.size += entry.real_size

    def _link(self, directory: int, name: str, entry: Entry) -> None:
        above, _, target = _inside(entry.link).rpartition("/")
        flags = os.O_PATH | os.O_DIRECTORY
        try:
            source = open_in_root(self._root, above or ".", flags)
        except KernelError as error:
            raise self._escape(entry.link, error) from error
        try:
            os.link(target, name, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError as error:
            raise InvalidArgument(
                "archive", entry.link, "hard links to members before them", reason="ARCHIVE_DAMAGED", entry=entry.name
            ) from error
        finally:
            os.close(source)

    @staticmethod
    def _settle(directory: int, name: str, entry: Entry) -> None:
        """Set owner, mode, xattrs and time; in this order, because chown clears setuid and capabilities."""
        os.chown(name, entry.uid, entry.gid, dir_fd=directory, follow_symlinks=False)
        if entry.type != "2":
            os.chmod(name, entry.mode & 0o7777, dir_fd=directory)
        for key, value in entry.xattrs.items():
            if not key.startswith("trusted.overlay."):
                os.setxattr(f"/proc/self/fd/{directory}/{name}", key, value, follow_symlinks=False)
        os.utime(name, (entry.mtime, entry.mtime), dir_fd=directory, follow_symlinks=False)


def _disarm(entry: Entry) -> None:
    """Take from a member what would give rights to who uses it.

    Raises:
        InvalidArgument: it is a device.
    """
    if entry.type in "34":
        raise InvalidArgument(
            "archive", entry.name, "an archive without devices", reason="ARCHIVE_DEVICE", entry=entry.name
        )
    if entry.type != "5":
        entry.mode &= ~0o6000
    entry.xattrs = {k: v for k, v in entry.xattrs.items() if not k.startswith(("security.", "trusted."))}


def _inside(name: str) -> str:
    """Return a member's path relative to the root.

    Raises:
        InvalidArgument: it would leave the root.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise InvalidArgument("archive", name, "members without '..'", reason="ARCHIVE_ESCAPE", entry=name)
    return "/".join(parts)


def _clear(directory: int, name: str) -> None:
    """Remove what has the name, whatever it is, so that nothing is written through it."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        shutil.rmtree(name, dir_fd=directory)


def _write_all(target: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
    return len(data)
