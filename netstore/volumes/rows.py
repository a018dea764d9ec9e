"""What volumes mean for the store: rows, and who uses them, inside one transaction."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from itertools import islice

from netstore.drivers.options import hidden
from netstore.errors import AlreadyExists
from netstore.model import Kind, Volume, VolumeSpec, new_id
from netstore.store import Transaction
from netstore.volumes.drivers.base import VolumeDriver

__all__ = [
    "ANONYMOUS_LABEL",
    "HOLDERS",
    "USES",
    "by_name",
    "changed",
    "forget_stage",
    "insert",
    "note",
    "note_schedule",
    "page",
    "refuse_difference",
    "rename_uses",
    "used",
]

# Containers, and the namespaces that are none's.
USES = (
    "SELECT volume_id, name FROM"
    " (SELECT volume_id, name, created FROM volume_uses JOIN containers ON container_id = containers.id"
    " UNION ALL SELECT volume_id, place, created FROM mounts WHERE volume_id IS NOT NULL)"
)
HOLDERS = "SELECT holder FROM volume_stages WHERE volume_id = ?"


ANONYMOUS_LABEL = "com.docker.volume.anonymous"


def insert(
    tx: Transaction, driver: VolumeDriver, name: str, spec: VolumeSpec, labels: Mapping[str, str], *, filling: str = ""
) -> Volume:
    volume_id = new_id()
    labels = dict(labels) if name else {ANONYMOUS_LABEL: "", **labels}
    volume = Volume(
        id=volume_id, name=name or volume_id, spec=spec, labels=labels, anonymous=not name, filling=filling,
        create_time=time.time(),
    )  # fmt: skip
    revision = tx.event(Kind.VOLUME, "fill" if filling else "create", volume_id, volume.name, driver=spec.driver)
    volume = replace(volume, mountpoint=str(driver.mountpoint(volume)), revision=revision)
    tx.volumes.insert(volume)
    return volume


def rename_uses(tx: Transaction, volume_id: str, name: str) -> None:
    """Let who mounts a volume know it by another name."""
    for container in tx.containers.all("id IN (SELECT container_id FROM volume_uses WHERE volume_id = ?)", volume_id):
        mounts = tuple(
            replace(each, volume=name, spec=replace(each.spec, source=name)) if each.volume_id == volume_id else each
            for each in container.mounts
        )
        tx.containers.update(replace(container, mounts=mounts))
    for row in tx.mounts.all("volume_id = ?", volume_id):
        shown = replace(row.mount, volume=name, spec=replace(row.mount.spec, source=name))
        tx.mounts.update(replace(row, mount=shown))


def page(
    tx: Transaction, after: tuple[float, str], size: int, wanted: Callable[[Volume, list[str]], bool]
) -> tuple[list[tuple[Volume, list[str]]], bool]:
    """Return up to `size` wanted volumes after an age, with who mounts them; and whether more follow.

    It costs what the page costs, however many volumes there are.
    """
    found: list[tuple[Volume, list[str]]] = []
    volumes = tx.volumes.by_age(after)
    query = f"{USES} WHERE volume_id IN (SELECT value FROM json_each(?)) ORDER BY created"
    while some := list(islice(volumes, size + 1)):
        ids = json.dumps([volume.id for volume in some])
        users: dict[str, list[str]] = {}
        for volume_id, name in tx.rows(query, ids):
            users.setdefault(volume_id, []).append(name)
        pairs = ((volume, users.get(volume.id, [])) for volume in some)
        found += [pair for pair in pairs if wanted(*pair)]
        if len(found) > size:
            return found[:size], True
    return found, False


def changed(tx: Transaction, volume: Volume, action: str = "update") -> Volume:
    volume = replace(volume, revision=tx.event(Kind.VOLUME, action, volume.id, volume.name))
    tx.volumes.update(volume)
    return volume


def undone(present: Volume, before: Volume, after: Volume) -> Volume:
    """Return a volume without the change from `before` to `after`; what somebody else changed since stays."""
    names = [
        each.name for each in fields(VolumeSpec) if getattr(present.spec, each.name) == getattr(after.spec, each.name)
    ]
    spec = replace(present.spec, **{name: getattr(before.spec, name) for name in names})
    return replace(present, spec=spec, labels=before.labels if present.labels == after.labels else present.labels)


def note(tx: Transaction, volume: Volume, action: str) -> None:
    """Record what happened to a volume from outside."""
    tx.event(Kind.VOLUME, action, volume.id, volume.name)


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
        "snapshot_schedule": spec.snapshot_schedule,
        "snapshot_keep": spec.snapshot_keep,
        "labels": dict(labels),
    }
    there = {
        "driver": present.spec.driver, "options": dict(present.spec.options), "size_bytes": present.spec.size_bytes,
        "block": present.spec.block, "snapshot_schedule": present.spec.snapshot_schedule,
        "snapshot_keep": present.spec.snapshot_keep, "labels": dict(present.labels),
    }  # fmt: skip
    difference = ", ".join(
        f"{key} is {_shown(there[key])}, asked for {_shown(asked[key])}" for key in asked if there[key] != asked[key]
    )
    if difference:
        raise AlreadyExists(
            f"volume {present.name} exists and differs: {difference}",
            hint="choose another name, or remove the volume first", difference=difference,
        )  # fmt: skip


def _shown(value: object) -> str:
    return repr({key: hidden(text) for key, text in value.items()} if isinstance(value, dict) else value)


def note_schedule(tx: Transaction, volume: Volume, before: str = "") -> None:
    """Begin to count from now, when a volume gets a schedule or another one."""
    if volume.spec.snapshot_schedule == before:
        return
    tx.execute("DELETE FROM snapshot_schedules WHERE volume_id = ?", volume.id)
    if volume.spec.snapshot_schedule:
        tx.execute("INSERT INTO snapshot_schedules VALUES (?, ?)", volume.id, time.time())
