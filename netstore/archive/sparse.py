"""Sparse members of pax archives, as GNU tar writes them (format 1.0): the body begins with a map of what is data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["Extent", "read_map", "real_size"]

Extent = tuple[int, int]  # offset in the file, length
_BLOCK, _MAX_EXTENTS, _MAX_DIGITS = 512, 1 << 20, 20


def real_size(records: Mapping[str, bytes]) -> int | None:
    """Return the size of the file that the pax records say is sparse, None when it is not.

    Raises:
        ValueError: it is sparse in another format, or its size is no number.
    """
    if not any(key.startswith("GNU.sparse.") for key in records):
        return None
    if (records.get("GNU.sparse.major"), records.get("GNU.sparse.minor")) != (b"1", b"0"):
        raise ValueError("a sparse member that is not of format 1.0: write the archive with --format=posix")
    size = int(records.get("GNU.sparse.realsize", b""))
    if not 0 <= size < 1 << 63:
        raise ValueError(f"a sparse member of {size} bytes")
    return size


def read_map(read: Callable[[int], bytes], size: int, stored: int) -> list[Extent]:
    """Read the map at the beginning of a member's body, which is `stored` bytes long with it, of a file of `size`.

    Raises:
        ValueError: it is no map, or not of this file.
    """
    text = _Numbers(read)
    count = text.next()
    if count > _MAX_EXTENTS:
        raise ValueError(f"a sparse map of {count} extents")
    extents, position = [], 0
    for _ in range(count):
        offset, length = text.next(), text.next()
        if offset < position or offset + length > size:
            raise ValueError("a sparse map that is not in order, or leaves the file")
        position = offset + length
        extents.append((offset, length))
    if text.taken + sum(length for _, length in extents) != stored:
        raise ValueError("a sparse map that does not fit its data")
    return extents


class _Numbers:
    """Decimal numbers, one a line, in blocks."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._rest = b""
        self.taken = 0

    def next(self) -> int:
        while b"\n" not in self._rest:
            if len(self._rest) > _MAX_DIGITS or not (block := self._read(_BLOCK)):
                raise ValueError("a sparse map that does not end")
            self.taken += len(block)
            self._rest += block
        line, _, self._rest = self._rest.partition(b"\n")
        if not line.isdigit() or len(line) > _MAX_DIGITS:
            raise ValueError("a sparse map that is no list of numbers")
        return int(line)
