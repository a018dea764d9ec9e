"""The images of a node: rows that name layers on disk."""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path

import structlog

from netstore.errors import Exhausted, InUse, InvalidArgument, NetstoreError
from netstore.launcher.images import registry
from netstore.launcher.images.formats import Format, Imported, import_archive
from netstore.launcher.images.layers import Layers
from netstore.model import Image, ImageConfig, Kind
from netstore.store import Store, Transaction
from netstore.threads import in_thread

__all__ = ["Images", "find_image", "normalise"]

log = structlog.get_logger(__name__)

# distribution/reference: lower-case path components, an optional registry host before them, an optional tag.
_REFERENCE = re.compile(
    r"(?:[a-zA-Z0-9][a-zA-Z0-9.-]*(?::[0-9]+)?/)?"
    r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*"
    r"(?::(?P<tag>[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}))?"
)


def normalise(name: str, *, field: str = "name") -> str:
    """Return "repository:tag", the tag "latest" where none is given, Docker Hub's own prefixes left out as Docker does.

    Raises:
        InvalidArgument: it is no reference.
    """
    name = name.removeprefix("docker.io/").removeprefix("library/")
    match = _REFERENCE.fullmatch(name)
    if not match or len(name) > 255:
        raise InvalidArgument(field, name, "repository[:tag], the repository in lower case, such as nginx:latest")
    return name if match["tag"] else f"{name}:latest"


def find_image(tx: Transaction, reference: str) -> Image:
    """Return an image by name[:tag], id or id prefix.

    Raises:
        NotFound, InvalidArgument: see `Table.find`.
    """
    if _REFERENCE.fullmatch(reference):
        row = tx.row("SELECT id FROM images WHERE name = ?", normalise(reference))
        if row:
            return tx.images.require(row[0])
    return tx.images.find(reference.removeprefix("sha256:"))


class Images:
    """Import, find, delete. Layers live below `root`."""

    def __init__(self, store: Store, root: Path) -> None:
        self._store = store
        self._root = root
        self.layers = Layers(root)
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Remove what a crash left: half-done work, and layers that no image has."""
        await asyncio.to_thread(self.layers.clean)
        await self._sweep()

    async def _sweep(self) -> None:
        """Remove layers that no image has; the caller holds the lock, or is alone."""
        wanted = {self.layers.path(layer).name for image in await self.all() for layer in image.layers}
        present = {path.name for path in (self._root / "layers").iterdir()}
        await in_thread(self.layers.remove, sorted(present - wanted))

    async def import_archive(
        self, chunks: AsyncIterator[bytes], *, name: str, format: Format | None, config: ImageConfig | None
    ) -> list[Image]:
        """Take an archive's bytes; all of its images are there afterwards, or none.

        Raises:
            InvalidArgument: see `import_archive` of the formats.
            Exhausted: no space is left.
        """
        name = normalise(name) if name else ""
        with tempfile.NamedTemporaryFile(dir=self._root / "tmp", prefix="incoming-") as spool:
            try:
                async for chunk in chunks:
                    await asyncio.to_thread(spool.write, chunk)
                await asyncio.to_thread(spool.flush)
            except OSError as error:
                raise Exhausted(f"receiving the archive: {error.strerror}", hint="free some space") from error
            return await self._keep(Path(spool.name), name=name, format=format, config=config)

    async def _keep(
        self, archive: Path, *, name: str, format: Format | None, config: ImageConfig | None = None
    ) -> list[Image]:
        """Unpack an archive and note its images. When that fails, or nobody waits for it any more, no layer stays."""
        async with self._lock:
            try:
                found = await in_thread(import_archive, archive, self.layers, name=name, format=format, config=config)
                return await self._store.write(lambda tx: [_insert(tx, image, name) for image in found])
            except BaseException:
                with suppress(OSError, NetstoreError):  # the next start does it
                    await self._sweep()
                raise

    async def pull(self, reference: str, *, login: tuple[str, str] | None) -> AsyncGenerator[str | Image, None]:
        """Fetch an image from its registry; yields what is being done, in words, and the image in the end.

        Raises:
            NetstoreError: see `registry.fetch`, and `import_archive` of the formats.
        """
        name = normalise(reference, field="image")
        with tempfile.TemporaryDirectory(dir=self._root / "tmp", prefix="pulling-") as place:
            archive = Path(place, "image")
            async with aclosing(registry.fetch(name, archive, login=login)) as said:
                async for line in said:
                    yield line
            images = await self._keep(archive, name=name, format=Format.OCI)
        yield images[0]

    async def get(self, reference: str) -> tuple[Image, list[str]]:
        """Return an image and the names of the containers made from it."""
        return await self._store.read(lambda tx: (image := find_image(tx, reference), _users(tx, image)))

    async def all(self) -> list[Image]:
        """Return every image, oldest first."""
        return await self._store.read(lambda tx: tx.images.all())

    async def users(self, image: Image) -> list[str]:
        """Return the names of the containers made from an image."""
        return await self._store.read(lambda tx: _users(tx, image))

    async def delete(self, reference: str) -> None:
        """Remove an image and the layers that no other image has.

        Raises:
            NotFound: there is none.
            InUse: a container was made from it.
        """

        def remove(tx: Transaction) -> set[str]:
            image = find_image(tx, reference)
            users = _users(tx, image)
            if users:
                raise InUse(
                    f"image {image.name or image.id[:12]} is used by {', '.join(users)}",
                    hint="remove the containers first", containers=", ".join(users),
                )  # fmt: skip
            tx.event(Kind.IMAGE, "remove", image.id, image.name)
            tx.images.delete(image.id)
            return set(image.layers) - {layer for other in tx.images.all() for layer in other.layers}

        async with self._lock:
            unused = await self._store.write(remove)
            await in_thread(self.layers.remove, sorted(unused))


def _users(tx: Transaction, image: Image) -> list[str]:
    """Return the names of the containers made from an image, or that mount it."""
    query = (
        "SELECT name FROM containers WHERE image_id = ? OR EXISTS (SELECT 1 FROM json_each(body, '$.mounts')"
        " WHERE json_extract(value, '$.source') = ?) ORDER BY created"
    )
    return [row[0] for row in tx.rows(query, image.id, image.id)]


def _insert(tx: Transaction, found: Imported, name: str) -> Image:
    wanted = name or next((normalise(each) for each in found.names if each), "")
    for holder in tx.images.all("name = ?", wanted) if wanted else []:
        if holder.id != found.id:  # the name moves on, as Docker's does
            tx.images.update(replace(holder, name=""))
    present = tx.images.get(found.id)
    revision = tx.event(Kind.IMAGE, "import", found.id, wanted)
    image = Image(
        id=found.id, name=wanted or (present.name if present else ""), config=found.config, layers=found.layers,
        size_bytes=found.size_bytes, architecture=found.architecture, os=found.os,
        create_time=present.create_time if present else time.time(), revision=revision,
    )  # fmt: skip
    if present:
        tx.images.update(image)
    else:
        tx.images.insert(image)
    return image
