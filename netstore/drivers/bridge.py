"""The driver `bridge`: networks of one node, on a Linux bridge each."""

from __future__ import annotations

from collections.abc import Sequence

from netstore.drivers.bridged import INHIBIT, NAME, SHARED_OPTIONS, BridgedDriver
from netstore.drivers.options import Option, boolean, interface, number

__all__ = ["BridgeDriver"]

ADVERTISING = (
    ("com.docker.network.advertise_addr_nmsgs", (0, 3), 3),
    ("com.docker.network.advertise_addr_ms", (100, 2000), 1000),
)


class BridgeDriver(BridgedDriver):
    """See the module."""

    name = "bridge"
    options: Sequence[Option] = (
        Option(NAME, interface, "", "name of the Linux bridge; by default derived from the network's id"),
        Option(INHIBIT, boolean, False, "give the bridge no IPv4 address: the gateway is another machine"),
        *SHARED_OPTIONS,
        *(Option(key, number(*limits), default, "accepted for Docker's sake: neighbours need not be told, because a MAC"
                 " goes with its address") for key, limits, default in ADVERTISING),
    )  # fmt: skip
