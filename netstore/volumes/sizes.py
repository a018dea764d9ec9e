"""What holds a volume's size on this node, and changing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from netstore.drivers.options import size_bytes
from netstore.errors import InvalidArgument, Unsupported
from netstore.model import VolumeSpec
from netstore.volumes.drivers.base import Capability, VolumeDriver

__all__ = ["check_resize", "settled"]

_HOLDERS = ("local", "btrfs", "image")
"""Who is asked for a size, in this order: a directory is cheapest, an image always holds."""


def settled(spec: VolumeSpec, drivers: Mapping[str, VolumeDriver]) -> VolumeSpec:
    """Return a spec with a driver, and with its size as a number: Docker gives it as the option `size`. Does not block.

    Raises:
        InvalidArgument: the size is none, or given twice.
        Unsupported: nothing holds a size here, with the reasons.
    """
    text = spec.options.get("size")
    if text is not None:
        try:
            size = size_bytes(text)
        except ValueError as error:
            raise InvalidArgument("spec.options[size]", text, str(error)) from error
        if spec.size_bytes not in (0, size):
            raise InvalidArgument("spec.options[size]", text, f"the size that is asked for already, {spec.size_bytes}")
        options = {key: value for key, value in spec.options.items() if key != "size"}
        spec = replace(spec, options=options, size_bytes=size)
    if spec.driver:
        return spec
    if not spec.size_bytes:
        return replace(spec, driver="local")
    reasons = []
    for name in _HOLDERS:
        driver = drivers.get(name)
        reason = "is not installed" if driver is None else driver.cannot_hold_size() or _strange(driver, spec)
        if not reason:
            return replace(spec, driver=name)
        reasons.append(f"{name}: {reason}")
    raise Unsupported(f"spec.size_bytes: nothing holds a size here ({'; '.join(reasons)})", reason="NO_SIZE")


def _strange(driver: VolumeDriver, spec: VolumeSpec) -> str:
    unknown = set(spec.options) - {option.key for option in driver.options}
    return f"has no option {', '.join(sorted(unknown))}" if unknown else ""


def check_resize(driver: VolumeDriver, spec: VolumeSpec, size: int) -> None:
    """Refuse a change of size that the driver cannot make.

    Raises:
        InvalidArgument, Unsupported: saying what it can.
    """
    if Capability.GROW not in driver.capabilities or driver.cannot_hold_size():
        raise Unsupported(
            f"spec.size_bytes: {driver.cannot_hold_size() or f'the driver {driver.name} changes no size'}",
            hint="`netstore volume drivers` shows which does",
        )
    if not size:
        raise InvalidArgument("spec.size_bytes", size, "a size: a limit that was set can only be moved")
    if size < spec.size_bytes and Capability.SHRINK not in driver.capabilities:
        raise InvalidArgument(
            "spec.size_bytes", size, f"at least {spec.size_bytes}: the driver {driver.name} does not shrink"
        )
    driver.validate(replace(spec, size_bytes=size))
