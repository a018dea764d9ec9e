"""The driver `null` (network "none"): only loopback."""

from __future__ import annotations

from netstore.drivers.base import Driver, Observed
from netstore.drivers.options import parse
from netstore.model import Endpoint, Network

__all__ = ["NullDriver"]


class NullDriver(Driver):
    """No interface, no address, no name: the sandbox keeps only loopback."""

    name = "null"
    predefined_only = True
    has_interfaces = False

    def validate(self, network: Network) -> Network:
        """Check the options, of which there are none."""
        parse(self.options, network.spec.options)
        return network

    def apply_network(self, network: Network) -> None:
        """Nothing to make."""

    def remove_network(self, network: Network) -> None:
        """Nothing to remove."""

    def apply_endpoint(self, network: Network, endpoint: Endpoint, namespace: int | None) -> None:
        """Nothing to attach."""

    def remove_endpoint(self, network: Network, endpoint: Endpoint, namespace: int | None = None) -> None:
        """Nothing to detach."""

    def observe(self, network: Network) -> Observed:
        """All is always there."""
        return Observed(interface=True, endpoints=frozenset())

    def default_route(self, network: Network, endpoint: Endpoint, namespace: int) -> None:
        """Nothing to route."""
