"""What volumes mean for the store: rows, and who uses them, inside one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from netstore.errors import AlreadyExists
from netstore.model import Kind, Volume, VolumeSpec
from netstore.store import Transaction

__all__ = ["HOLDERS", "USES", "by_name", "changed", "forget_stage", "refuse_difference", "used"]

# Containers, and the namespaces that are none's.
USES = (
    "SELECT volume_id, name FROM"
    " (SELECT volume_id, name, created FROM volume_uses JOIN containers ON container_id = containers.id"
    " UNION ALL SELECT volume_id, place, created FROM mounts WHERE volume_id IS NOT NULL)"
)
HOLDERS = "SELECT holder FROM volume_stages WHERE volume_id = ?"


def changed(tx: Transaction, volume: Volume) -> Volume:
    volume = replace(volume, revision=tx.event(Kind.VOLUME, "update", volume.id, volume.name))
    tx.volumes.update(volume)
    return volume


def forget_stage(tx: Transaction, *, volume_id: str, holder: str) -> None:
    tx.execute("DELETE FROM volume_stages WHERE volume_id = ? AND holder = ?", volume_id, holder)


def by_name(tx: Transaction, name: str) -> Volume | None:
    return next(iter(tx.volumes.all("name = ?", name)), None) if name else None


def used(tx: Transaction, volume: Volume) -> tuple[Volume, list[str]]:
    found = tx.rows(f"{USES} WHERE volume_id = ? ORDER BY created", volume.id)
    return volume, [row[1] for row in found]


def refuse_difference(present: Volume, spec: VolumeSpec, labels: Mapping[str, str]) -> None:
    asked = {
        "driver": spec.driver,
        "options": dict(spec.options),
        "size_bytes": spec.size_bytes,
        "block": spec.block,
        "labels": dict(labels),
    }
    there = {
        "driver": present.spec.driver, "options": dict(present.spec.options), "size_bytes": present.spec.size_bytes,
        "block": present.spec.block, "labels": dict(present.labels),
    }  # fmt: skip
    difference = ", ".join(
        f"{key} is {there[key]!r}, asked for {asked[key]!r}" for key in asked if there[key] != asked[key]
    )
    if difference:
        raise AlreadyExists(
            f"volume {present.name} exists and differs: {difference}",
            hint="choose another name, or remove the volume first", difference=difference,
        )  # fmt: skip
