"""Streams of bytes, plain or compressed."""

from __future__ import annotations

import zlib
from typing import Protocol

import zstandard

__all__ = ["CHUNK", "Source", "compressed", "decompressed"]

CHUNK = 1 << 18
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class Source(Protocol):
    """What bytes are read from."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, b"" at the end."""
        ...


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
                following = self._inflate.unused_data or self._source.read(CHUNK)
                if not following.strip(b"\0"):
                    return b""
                self._inflate, self._rest = zlib.decompressobj(31), following
            chunk = self._rest or self._source.read(CHUNK)
            data = self._inflate.decompress(chunk, size)
            self._rest = self._inflate.unconsumed_tail
            if data:
                return data
            if not chunk and not self._inflate.eof:
                raise EOFError("the gzip stream ends too early")
