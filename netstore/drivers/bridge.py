"""The driver `bridge`: networks of one node, on a Linux bridge each."""

from __future__ import annotations

from collections.abc import Sequence

from netstore.drivers.bridged import INHIBIT, NAME, SHARED_OPTIONS, BridgedDriver
from netstore.drivers.options import Option, boolean, interface

__all__ = ["BridgeDriver"]


class BridgeDriver(BridgedDriver):
    """See the module."""

    name = "bridge"
    options: Sequence[Option] = (
        Option(NAME, interface, "", "name of the Linux bridge; by default derived from the network's id"),
        Option(INHIBIT, boolean, False, "give the bridge no IPv4 address: the gateway is another machine"),
        *SHARED_OPTIONS,
    )  # fmt: skip
