"""The driver local: what it mounts as Docker's does."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernel.volumes import local
from netstore.errors import (
    InvalidArgument,
    NetstoreError,
)
from netstore.kernel import tools
from netstore.kernel.mounts import is_mount_point
from netstore.volumes.drivers.base import VolumeDriver


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"type": "nosuchfs", "device": "x"}, "this kernel has no filesystem nosuchfs"),
        ({"type": "ext4", "device": "/dev/nosuch"}, "mounting /dev/nosuch"),
        ({"type": "ext4", "device": "/etc/passwd"}, "must be a block device"),
        ({"type": "none", "device": "/nosuch", "o": "bind"}, "mounting /nosuch"),
        ({"type": "tmpfs", "device": "tmpfs", "o": "size=banana"}, "wrong options"),
        ({"type": "nfs", "device": "203.0.113.9:/x", "o": "addr=203.0.113.9", "timeout": "5"}, "203.0.113.9:/x"),
        ({"type": "cifs", "device": "//203.0.113.9/x", "o": "username=u,password=hidden"}, "//203.0.113.9/x"),
    ],
)
def test_what_cannot_be_mounted_leaves_nothing(
    drivers: dict[str, VolumeDriver], options: dict[str, str], said: str
) -> None:
    volume, driver = local(**options), drivers["local"]
    driver.validate(volume.spec)
    driver.create(volume)
    with pytest.raises(NetstoreError, match=said) as caught:
        driver.stage(volume)
    assert "hidden" not in str(caught.value)
    assert not driver.mountpoint(volume).exists()
    driver.remove(volume)


def test_a_server_that_hangs_is_given_up(
    drivers: dict[str, VolumeDriver], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, driver = local(type="nfs", device="dead:/x", timeout="1"), drivers["local"]
    driver.create(volume)
    helper = place / "bin/mount"
    helper.parent.mkdir()
    helper.write_text("#!/bin/sh\nexec sleep 30\n")
    helper.chmod(0o755)
    monkeypatch.setattr(tools, "_PATH", f"{helper.parent}:/usr/bin:/bin")  # no kernel here has NFS: it stands for it
    with pytest.raises(NetstoreError, match="did not end in 1 s, and was killed"):
        driver.stage(volume)
    assert not is_mount_point(driver.mountpoint(volume))
    driver.remove(volume)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"device": "/dev/x"}, "type"), ({"type": "ext4"}, "device"), ({"o": "ro"}, "type"),
        ({"type": "none", "device": "/x", "o": "ro"}, "o"), ({"type": "none", "device": "x", "o": "bind"}, "device"),
        ({"type": "../x", "device": "x"}, "type"), ({"type": "ext4", "device": "x", "o": "a,,b"}, "o"),
        ({"timeout": "0"}, "timeout"),
    ],
)  # fmt: skip
def test_options_of_local(drivers: dict[str, VolumeDriver], options: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"spec\.options\[{field}\]"):
        drivers["local"].validate(local(**options).spec)
