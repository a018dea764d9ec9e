"""Layers on disk: `layers/<digest>` is one unpacked layer, whole or not there; `tmp/` is where work is done."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from netstore.archive import Source, Unpacked, unpack
from netstore.errors import InvalidArgument
from netstore.kernel.files import remove_tree, tree_bytes
from netstore.kernel.mounts import sync_file_system
from netstore.kernel.paths import closing

__all__ = ["Layers"]


class Layers:
    """The layers below one directory. Blocking."""

    def __init__(self, root: Path) -> None:
        self._layers = root / "layers"
        self._empty = root / "empty"
        self._tmp = root / "tmp"

    def clean(self) -> None:
        """Make the directories; remove what a crash left in `tmp/`."""
        self._layers.mkdir(parents=True, exist_ok=True, mode=0o711)
        self._empty.mkdir(exist_ok=True, mode=0o711)
        remove_tree(self._tmp)
        self._tmp.mkdir(mode=0o700)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Give a directory that is removed in the end, with what is still in it."""
        place = Path(tempfile.mkdtemp(dir=self._tmp))
        try:
            yield place
        finally:
            remove_tree(place)

    def path(self, digest: str) -> Path:
        """Return where a layer is. Half of its digest keeps an overlay's options short; it is still 128 bits."""
        return self._layers / digest[:32]

    def stack(self, digests: Sequence[str]) -> list[Path]:
        """Return the directories of an image's layers, top first, and an empty one below: an overlay that nobody writes
        to has two at least.
        """
        return [*(self.path(digest) for digest in reversed(digests)), self._empty]

    def __contains__(self, digest: str) -> bool:
        return self.path(digest).is_dir()

    def add(self, source: Source, staging: Path, *, expected: str = "") -> tuple[str, Unpacked]:
        """Unpack a layer and put it into place; returns its digest (OCI: diff id, sha256 of the plain tar).

        Raises:
            InvalidArgument: damaged, hostile, or not of the digest expected.
        """
        place = Path(tempfile.mkdtemp(dir=staging))
        place.chmod(0o755)
        with closing(os.open(place, os.O_RDONLY | os.O_DIRECTORY)) as root:
            unpacked = unpack(source, root, whiteouts=True)
            if expected and unpacked.digest != expected:
                raise InvalidArgument(
                    "archive", unpacked.digest, f"a layer of sha256 {expected}", reason="ARCHIVE_DAMAGED", offset=0
                )
            sync_file_system(root)
        target = self.path(unpacked.digest)
        if not target.is_dir():
            place.rename(target)
            with closing(os.open(self._layers, os.O_RDONLY | os.O_DIRECTORY)) as parent:
                os.fsync(parent)
        return unpacked.digest, unpacked

    def remove(self, digests: Iterable[str]) -> None:
        """Remove layers: out of sight at once, then file by file."""
        with self.staging() as place:
            for digest in digests:
                if digest in self:
                    self.path(digest).rename(place / digest[:32])

    def usage(self, digest: str) -> int:
        """Return the bytes that a layer's files take."""
        return tree_bytes(self.path(digest))
