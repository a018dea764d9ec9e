"""Limits of the neighbour tables: raised, never lowered, and left alone where there are none."""

from __future__ import annotations

from pathlib import Path

from netstore.kernel.sysctls import raise_neighbour_limits


def test_neighbour_limits_go_up_only(tmp_path: Path) -> None:
    raise_neighbour_limits(tmp_path)  # a namespace that does not show them
    assert list(tmp_path.iterdir()) == []
    for family, values in (("ipv4", (128, 512, 1024)), ("ipv6", (128, 512, 100_000))):
        place = tmp_path / family / "neigh/default"
        place.mkdir(parents=True)
        for number, value in enumerate(values, start=1):
            (place / f"gc_thresh{number}").write_text(f"{value}\n")
    raise_neighbour_limits(tmp_path)
    found = {
        family: [int((tmp_path / family / f"neigh/default/gc_thresh{number}").read_text()) for number in (1, 2, 3)]
        for family in ("ipv4", "ipv6")
    }
    assert found == {"ipv4": [4096, 8192, 16384], "ipv6": [4096, 8192, 100_000]}
