"""The driver `host` (network "host"): the sandbox is the node's own namespace."""

from __future__ import annotations

from netstore.drivers.null import NullDriver

__all__ = ["HostDriver"]


class HostDriver(NullDriver):
    """As `null`, there is nothing to make: what is there already is used."""

    name = "host"
