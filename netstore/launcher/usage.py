"""What images, containers and volumes take of the node: `system df`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from netstore.kernel.files import tree_bytes
from netstore.launcher.rows import Joined
from netstore.model import Image, Kind
from netstore.volumes.manager import VolumeManager

__all__ = ["Use", "usage"]

Use = tuple[Kind, int, int, int, int]
"""Kind, how many, how many in use, bytes, bytes of the unused."""


async def usage(
    joined: Sequence[Joined], trees: Mapping[str, Path], images: Sequence[Image], volumes: VolumeManager
) -> list[Use]:
    """Measure; `trees` are what containers wrote, by id."""
    used = {image.id for _, image, _, _ in joined}
    rows = [_sum(Kind.IMAGE, [(image.size_bytes, image.id in used) for image in images])]
    sizes = [(await asyncio.to_thread(tree_bytes, trees[each.id]), bool(each.pid)) for each, _, _, _ in joined]
    rows.append(_sum(Kind.CONTAINER, sizes))
    found = [(await volumes.measure(volume), bool(names)) for volume, names in await volumes.all()]
    return [*rows, _sum(Kind.VOLUME, found)]


def _sum(kind: Kind, sizes: list[tuple[int, bool]]) -> Use:
    unused = sum(size for size, active in sizes if not active)
    return kind, len(sizes), sum(active for _, active in sizes), sum(size for size, _ in sizes), unused
