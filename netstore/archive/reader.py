"""The members of a tar stream, one after the other. What a header says is checked here: nothing after has to."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import zstandard

from netstore.archive.sparse import Extent, read_map, real_size
from netstore.archive.streams import CHUNK, Source
from netstore.errors import InvalidArgument

__all__ = ["Entry", "Reader"]

BLOCK = 512
_NOBODY = (1 << 32) - 1  # chown(2): leaves the owner as it is
_LATEST = 1 << 40  # seconds
_LARGEST_DEVICE = (1 << 32) - 1
_MAX_HEADER = 1 << 20  # bytes of pax headers and long names before one member; real ones are a few hundred


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


class Reader:
    """Members in order. Keeps the offset and the sha256 of all it read, which of a layer is its diff id."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = 0
        self._padding = 0
        self._global: dict[str, bytes] = {}
        self._global_bytes = 0
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
        extended = 0
        while True:
            self.skip()
            block = self._read(BLOCK)
            if not block.strip(b"\0"):
                self._drain()
                return
            entry = self._header(block)
            self._left, self._padding = entry.size, -entry.size % BLOCK
            if entry.type in "xgLK":
                extended += entry.size
                if self._global_bytes + extended > _MAX_HEADER:  # they are kept in memory
                    raise self.damaged(f"extended headers of {self._global_bytes + extended} bytes")
                data = self._body()
                if entry.type == "g":
                    self._global |= self._pax(data)
                    self._global_bytes, extended = self._global_bytes + entry.size, extended - entry.size
                elif entry.type == "x":
                    overrides |= self._pax(data)
                else:
                    overrides["path" if entry.type == "L" else "linkpath"] = data.rstrip(b"\0")
                continue
            self._override(entry, {**self._global, **overrides})
            self._check(entry)
            overrides, extended = {}, 0
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
            self.read(CHUNK)
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
                part = self._source.read(CHUNK)
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
        digits = raw.strip(b"\0 ") or b"0"
        if digits.strip(b"01234567"):  # int() would take signs, and a size below 0 reads all that there is
            raise self.damaged(f"no octal number: {raw!r}")
        return int(digits, 8)

    def _pax(self, data: bytes) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        while data:
            length_text, _, _ = data.partition(b" ")
            if (
                not length_text.isdigit()
                or len(length_text) > 7
                or not len(length_text) < int(length_text) <= len(data)
            ):
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

    def _check(self, entry: Entry) -> None:
        """Refuse what no system call takes."""
        wrong = {
            "owner": not (0 <= entry.uid < _NOBODY and 0 <= entry.gid < _NOBODY),
            "time": not abs(entry.mtime) < _LATEST,  # also of what is no number
            "size": entry.size < 0,
            "link": "\0" in entry.link or (entry.type in "12" and not entry.link),
            "device": max(entry.device) > _LARGEST_DEVICE,
            "extended attribute": any(not key or "\0" in key for key in entry.xattrs),
        }
        for what, refused in wrong.items():
            if refused:
                raise self.damaged(f"a member whose {what} cannot be: {entry.name[:100]!r}")


def _text(raw: bytes) -> str:
    return os.fsdecode(raw.split(b"\0", 1)[0])
