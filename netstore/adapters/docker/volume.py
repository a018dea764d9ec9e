"""VolumeDriver: dockerd's volumes are ours; each mount of one holds it staged."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from netstore.adapters.docker.messages import Nothing, VolumeCall, VolumeCreate
from netstore.errors import NotFound
from netstore.model import Volume, VolumeSpec
from netstore.rpc.fields import check_name
from netstore.volumes.manager import VolumeManager

__all__ = ["VolumeDriver"]

_HOLDER = "docker "
"""Who holds a volume that dockerd mounted: with this, and the mount's id."""


class VolumeDriver:
    """See the module. Every call may come again, or late."""

    def __init__(self, volumes: VolumeManager) -> None:
        self._volumes = volumes

    async def capabilities(self, _: Nothing) -> dict[str, Any]:
        """Answer that every dockerd has its own volumes."""
        return {"Capabilities": {"Scope": "local"}}

    async def create(self, call: VolumeCreate) -> dict[str, Any]:
        """Make a volume; the option `driver` names ours, the others are its options."""
        options = dict(call.opts or {})
        spec = VolumeSpec(driver=options.pop("driver", ""), options=options)
        await self._volumes.create(check_name("volume", call.name), spec, labels={})
        return {}

    async def remove(self, call: VolumeCall) -> dict[str, Any]:
        """Remove a volume: dockerd asks only once no container of its own has it, whatever it forgot to unmount."""
        try:
            volume = await self._volumes.named(call.name)
            for holder in self._volumes.staging.holders(volume.id):
                if holder.startswith(_HOLDER):
                    await self._volumes.unstage(volume.id, holder)
            await self._volumes.delete(volume.id)
        except NotFound:
            pass
        return {}

    async def mount(self, call: VolumeCall) -> dict[str, Any]:
        """Stage a volume for one more mount."""
        volume = await self._volumes.named(call.name)
        volume, _ = await self._volumes.stage(volume.id, _HOLDER + call.id)
        return {"Mountpoint": volume.mountpoint}

    async def unmount(self, call: VolumeCall) -> dict[str, Any]:
        """Give a mount's hold back."""
        try:
            await self._volumes.unstage((await self._volumes.named(call.name)).id, _HOLDER + call.id)
        except NotFound:
            pass
        return {}

    async def path(self, call: VolumeCall) -> dict[str, Any]:
        """Answer where a volume is once it is mounted."""
        volume = await self._volumes.named(call.name)
        return {"Mountpoint": volume.mountpoint}

    async def get(self, call: VolumeCall) -> dict[str, Any]:
        """Answer a volume."""
        volume = await self._volumes.named(call.name)
        return {"Volume": _message(volume)}

    async def list(self, _: Nothing) -> dict[str, Any]:
        """Answer every volume."""
        return {"Volumes": [_message(volume) for volume, _ in await self._volumes.all()]}


def _message(volume: Volume) -> dict[str, Any]:
    return {
        "Name": volume.name, "Mountpoint": volume.mountpoint, "Status": {"driver": volume.spec.driver},
        "CreatedAt": datetime.fromtimestamp(volume.create_time, UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
