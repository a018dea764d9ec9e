"""Tar members made in a directory, none of them outside of it."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from netstore.archive.reader import Entry, Reader
from netstore.archive.streams import CHUNK, Source, decompressed
from netstore.errors import Exhausted, InvalidArgument, KernelError
from netstore.kernel.files import remove_tree
from netstore.kernel.paths import open_in_root, set_mode

__all__ = ["Unpacked", "unpack"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"


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
        if error.errno == errno.ENAMETOOLONG:
            raise reader.damaged("a name that is too long") from error
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
        above, missing = path, []
        while (found := self._opened(above)) < 0:
            above, _, name = above.rpartition("/")
            missing.append(name)
        for name in reversed(missing):
            above = f"{above}/{name}" if above else name
            try:
                os.mkdir(name, 0o755, dir_fd=found)
            except FileExistsError:  # a link to nowhere inside the root
                raise self._escape(path, errno.ENOENT) from None
            finally:
                os.close(found)
            found = open_in_root(self._root, above, _DIRECTORY)
        os.close(self._parent[1])
        self._parent = (path, found)
        return found

    def _opened(self, path: str) -> int:
        """Return the open directory `path`, -1 where there is none yet."""
        try:
            return open_in_root(self._root, path or ".", _DIRECTORY)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise self._escape(path, error.errno) from error
            return -1

    @staticmethod
    def _escape(path: str, code: int) -> InvalidArgument:
        accepted = f"members whose parents are directories ({os.strerror(code)})"
        return InvalidArgument("archive", path, accepted, reason="ARCHIVE_ESCAPE", entry=path[:200])

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
            while data := reader.read(CHUNK):
                self.size += _write_all(target, data)
            return
        for offset, length in reader.sparse_map(entry):
            os.lseek(target, offset, os.SEEK_SET)
            while length:
                length -= _write_all(target, reader.read(min(length, CHUNK)))
        os.ftruncate(target, entry.real_size)
        self.size += entry.real_size

    def _link(self, directory: int, name: str, entry: Entry) -> None:
        above, _, target = _inside(entry.link).rpartition("/")
        flags = os.O_PATH | os.O_DIRECTORY
        try:
            source = open_in_root(self._root, above or ".", flags)
        except KernelError as error:
            raise self._escape(entry.link, error.errno) from error
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
            set_mode(directory, name, entry.mode & 0o7777)
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
        remove_tree(Path(f"/proc/self/fd/{directory}/{name}"))


def _write_all(target: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
    return len(data)
