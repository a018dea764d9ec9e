"""The conformance suite of network drivers: every driver that is installed, a third party's too, on the real kernel."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from conftest import Host

NOT_IN_KERNEL = 77
WORKER = Path(__file__).with_name("driver_worker.py")


@pytest.mark.parametrize("driver", sorted(point.name for point in entry_points(group="netstore.drivers")))
def test_driver(host: Host, driver: str) -> None:
    host.netns("c")
    done = host.run(sys.executable, str(WORKER), driver, check=False)
    if done.returncode == NOT_IN_KERNEL and "NETSTORE_TEST_LAB" not in os.environ:
        pytest.skip(f"{done.stdout.strip()}: proven in the lab")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert [name for name, value in seen.items() if value is False] == []
    if seen["inside"]:
        assert "10.66.0.2" in seen["inside"]
        assert "default via 10.66.0.1" in seen["inside"]
        assert "default via fd00:66::1" in seen["inside"]
        assert "eth0" in seen["refusal"] or "EEXIST" in seen["refusal"]
    for option in seen["options"]:
        assert option["key"]
        assert option["doc"]
