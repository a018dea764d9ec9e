"""Volumes as the tests of their drivers ask for them."""

from __future__ import annotations

from pathlib import Path

from netstore.model import Volume, VolumeSpec, new_id

MIB = 1 << 20


def fill(path: Path) -> int:
    """Write until it fails; returns the errno."""
    with path.open("wb", buffering=0) as file:
        for _ in range(1000):
            try:
                file.write(bytes(MIB))
            except OSError as error:
                return error.errno or 0
    return 0


def local(**options: str) -> Volume:
    return Volume(id=new_id(), name="v", spec=VolumeSpec(driver="local", options=options))


def block(**options: str) -> Volume:
    return Volume(id=new_id(), name="v", spec=VolumeSpec(driver="block", options=options))


def image(kind: str, size: int, **options: str) -> Volume:
    spec = VolumeSpec(driver="image", size_bytes=size * MIB, options={"fs": kind, **options})
    return Volume(id=new_id(), name="v", spec=spec)
