"""The conformance suite of volume drivers: every driver that is installed."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from netstore.errors import NetstoreError
from netstore.model import Volume, VolumeSpec, new_id
from netstore.volumes.drivers.base import load_drivers


@pytest.mark.parametrize("name", sorted(point.name for point in entry_points(group="netstore.volume_drivers")))
def test_driver(place: Path, name: str) -> None:
    driver = load_drivers(place / "volumes")[name]
    spec = VolumeSpec(driver=name)
    driver.validate(spec)
    with pytest.raises(NetstoreError, match=r"spec\.options"):
        driver.validate(VolumeSpec(driver=name, options={"no-such-option": "x"}))
    volumes = [Volume(id=new_id(), name=each, spec=spec) for each in ("one", "two")]
    descriptors = len(os.listdir("/proc/self/fd"))
    driver.remove(volumes[0])  # what is not there is a success
    assert driver.observe() == set()
    for volume in volumes:
        driver.apply(volume)
        (driver.mountpoint(volume) / "data").write_text(volume.name)
        driver.apply(volume)  # idempotent: what is in it stays
        assert (driver.mountpoint(volume) / "data").read_text() == volume.name
        assert driver.usage(volume) >= len(volume.name)
    assert driver.observe() == {"one", "two"}
    driver.remove(volumes[0])
    driver.remove(volumes[0])
    assert driver.observe() == {"two"}
    assert (driver.mountpoint(volumes[1]) / "data").read_text() == "two"
    driver.remove(volumes[1])
    assert driver.observe() == set()
    assert not list((place / "volumes").rglob("data"))
    assert len(os.listdir("/proc/self/fd")) == descriptors
