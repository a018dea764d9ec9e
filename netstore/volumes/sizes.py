"""What holds a volume's size on this node, and changing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from netstore.drivers.options import hidden, size_bytes
from netstore.errors import FailedPrecondition, Immutable, InUse, InvalidArgument, Unsupported
from netstore.model import Volume, VolumeSpec
from netstore.volumes.drivers.base import Capability, VolumeDriver
from netstore.volumes.schedules import ACCEPTED, Schedule

__all__ = ["changed_spec", "driver_named", "prepared", "settled"]

_MOUNTING = {"local": frozenset({"o", "timeout"}), "image": frozenset({"o"}), "block": frozenset({"o"})}
"""Options that count when a volume is mounted, and so may change while it is not."""
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


def prepared(spec: VolumeSpec, drivers: Mapping[str, VolumeDriver]) -> VolumeSpec:
    """Return a spec that a volume can be made by. Does not block.

    Raises:
        InvalidArgument, Unsupported: naming the field.
        FailedPrecondition: its driver makes no volumes here.
    """
    check_schedule(spec)
    spec = settled(spec, drivers)
    driver = driver_named(drivers, spec.driver)
    driver.validate(spec)
    reason = driver.available or (spec.size_bytes and driver.cannot_hold_size())
    if reason:
        raise FailedPrecondition(f"the driver {driver.name}: {reason}", reason="DRIVER_UNAVAILABLE")
    return spec


def changed_spec(driver: VolumeDriver, volume: Volume, changes: Mapping[str, object], *, used: bool) -> VolumeSpec:
    """Return a volume's spec with changes: fields of it by name. Does not block.

    Raises:
        InvalidArgument, Unsupported: the size, or the schedule, cannot be so.
        Immutable: another option than those of mounting.
        InUse: such an option, and the volume is used.
    """
    spec = replace(volume.spec, **changes)  # type: ignore[arg-type]
    old = volume.spec.options  # whoever sends back what was shown changes nothing
    options = {k: old[k] if k in old and v == hidden(old[k]) else v for k, v in spec.options.items()}
    spec = replace(spec, options=options)
    check_schedule(spec)
    if spec.size_bytes != volume.spec.size_bytes:
        _check_resize(driver, volume.spec, spec.size_bytes)
    different = {key for key, _ in set(spec.options.items()) ^ set(volume.spec.options.items())}
    mutable = _MOUNTING.get(driver.name, frozenset())
    if fixed := different - mutable:
        raise Immutable(f"spec.options[{min(fixed)}]", ", ".join(sorted(mutable)) or "none")
    if different and used:
        raise InUse(f"volume {volume.name} is mounted with these options", hint="stop what uses it, then change them")
    driver.validate(spec)
    return spec


def check_schedule(spec: VolumeSpec) -> None:
    """Check when snapshots are made.

    Raises:
        InvalidArgument: naming the field.
    """
    if not 0 <= spec.snapshot_keep <= 10_000:
        raise InvalidArgument("spec.snapshot_keep", spec.snapshot_keep, "0 (means 24) to 10000")
    if spec.snapshot_schedule:
        try:
            Schedule.parse(spec.snapshot_schedule)
        except (ValueError, OverflowError) as error:
            raise InvalidArgument("spec.snapshot_schedule", spec.snapshot_schedule, f"{error}: {ACCEPTED}") from error


def driver_named(drivers: Mapping[str, VolumeDriver], name: str) -> VolumeDriver:
    """Return a driver.

    Raises:
        InvalidArgument: there is none.
    """
    if name not in drivers:
        known = ", ".join(sorted(drivers))
        raise InvalidArgument("spec.driver", name, f"one of {known}", reason="UNKNOWN_DRIVER")
    return drivers[name]


def _strange(driver: VolumeDriver, spec: VolumeSpec) -> str:
    unknown = set(spec.options) - {option.key for option in driver.options}
    return f"has no option {', '.join(sorted(unknown))}" if unknown else ""


def _check_resize(driver: VolumeDriver, spec: VolumeSpec, size: int) -> None:
    """Refuse a change of size that the driver cannot make.

    Raises:
        InvalidArgument, Unsupported: saying what it can.
    """
    if Capability.GROW not in driver.capabilities or driver.cannot_hold_size():
        raise Unsupported(
            f"spec.size_bytes: the driver {driver.name}: {driver.cannot_hold_size() or 'it changes no size'}",
            hint="`netstore volume drivers` shows which does",
        )
    if not size:
        raise InvalidArgument("spec.size_bytes", size, "a size: a limit that was set can only be moved")
    if size < spec.size_bytes and Capability.SHRINK not in driver.capabilities:
        raise InvalidArgument(
            "spec.size_bytes", size, f"at least {spec.size_bytes}: the driver {driver.name} does not shrink"
        )
    driver.validate(replace(spec, size_bytes=size))
