"""The interface of network drivers: what the network manager asks of one, and what it may use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points

from netstore.drivers.options import Option
from netstore.errors import FailedPrecondition, NetstoreError
from netstore.kernel.firewall import Element, Firewall
from netstore.kernel.links import Deletions
from netstore.model import Endpoint, Network, Node, PortMapping, RemoteEndpoint, Scope

__all__ = ["Driver", "Host", "Observed", "load_drivers"]


@dataclass(frozen=True, slots=True)
class Host:
    """What drivers share on a node."""

    firewall: Firewall
    deletions: Deletions
    relay_port: Callable[[], int] = lambda: 0
    """Where the relay of ::1 listens, 0 when there is none."""
    vtep: str = ""
    """The node's address on the underlay, "" where it is in no cluster."""
    vxlan_port: int = 4789
    """UDP port of the tunnels, the same on every node; the next one is that of encrypted networks'."""
    wireguard_port: int = 51820
    """The node's UDP port of what is encrypted, the same on every node."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What the kernel holds of a network: its own interface, the host's ends of its endpoints, and the addresses whose
    MAC the host was told for good.

    `single` are addresses that the network's interface has alone, without a subnet: services' among them.

    `remotes` are (address, MAC, VTEP) of every remote endpoint that entries lead to, "" for a part that is missing.
    """

    interface: bool
    endpoints: frozenset[str]
    neighbours: frozenset[str] = frozenset()
    single: frozenset[str] = frozenset()
    remotes: frozenset[tuple[str, str, str]] = frozenset()


class Driver(ABC):
    """Makes networks and endpoints real in the kernel.

    All verbs but `validate` block and run in the kernel's executor. `apply_*` takes the whole desired state, makes the
    kernel so, and does nothing where it is so already; `remove_*` tolerates what is gone. Each raises `KernelError`
    with what it made taken back.
    """

    name: str
    scope = Scope.LOCAL
    """Global: the network is on every node of the cluster, and `apply_remote` and `apply_peers` are called."""
    options: Sequence[Option] = ()
    predefined_only = False
    """Only the predefined instance exists (host, null)."""
    has_interfaces = True
    """Endpoints have an interface, addresses and names."""
    ends_inside = False
    """An endpoint's interface has no end in the host: it is looked for, and removed, in its namespace."""
    publishes_ports = False
    """Ports of the host lead to its endpoints."""
    has_services = False
    """Its networks can have services: `apply_services` is called."""
    chooses_gateway = True
    """A subnet without a gateway gets one, the first address."""
    takes_leases = False
    """A DHCP server of the physical network may give its endpoints their addresses."""
    shares_mac = False
    """Its endpoints all have their parent's MAC."""
    has_policies = False
    """Its networks can have policies: `elements` holds those of `Firewall.policing`."""

    def __init__(self, host: Host) -> None:
        self.host = host

    @abstractmethod
    def validate(self, network: Network) -> Network:
        """Check the spec and fill in what the driver chooses (interface, MTU). Pure; it is asked once more when the
        network's pools are known. The MTU that it gets is the uplink's.

        Raises:
            InvalidArgument: naming the field.
        """

    def check_beside(self, network: Network, others: Sequence[Network]) -> None:
        """Check that the network can be there beside the others of the node. Pure.

        Raises:
            FailedPrecondition: naming the other one.
        """
        return

    def is_here(self, network: Network) -> bool:
        """Say whether the network is in this node's kernel: one of scope global is from its first use here on."""
        return self.scope is Scope.LOCAL or bool(network.host_addresses)

    @abstractmethod
    def apply_network(self, network: Network) -> None:
        """Make the network's own kernel objects."""

    @abstractmethod
    def remove_network(self, network: Network) -> None:
        """Remove the network's own kernel objects."""

    def hand_over(self, network: Network, heir: Network) -> None:
        """Give an interface of a network that is about to be removed to another one that is on it too."""
        return

    def update_network(self, old: Network, new: Network, endpoints: Collection[Endpoint]) -> None:
        """Make the kernel follow a change of a network whose attached endpoints are these; `old` is what is there.

        What is inside of the endpoints' sandboxes is left to `update_endpoint`, which the caller calls for each of them
        afterwards. By default a change asks nothing of the kernel.
        """
        return

    @abstractmethod
    def apply_endpoint(self, network: Network, endpoint: Endpoint, namespace: int | None) -> None:
        """Put the endpoint's interface into the namespace of that descriptor; without one it waits in the host's."""

    def update_endpoint(
        self, network: Network, endpoint: Endpoint, namespace: int, *, before: Network | None = None
    ) -> None:
        """Make the kernel follow a change of an attached endpoint's options, or of its network, which was `before`.

        By default there is nothing to do.
        """
        return

    @abstractmethod
    def remove_endpoint(self, network: Network, endpoint: Endpoint, namespace: int | None = None) -> None:
        """Take the endpoint's interface and ports away; with `ends_inside` the namespace is given while it lives."""

    def is_inside(self, network: Network, endpoint: Endpoint, namespace: int) -> bool:
        """With `ends_inside`: say whether the endpoint's interface is in the namespace."""
        return True

    def forget_neighbours(self, network: Network, addresses: Collection[str]) -> None:
        """Take from the host what it was told of addresses that no endpoint has; by default it was told nothing."""
        return

    def reaches(self, remote: RemoteEndpoint) -> bool:
        """Say whether packets can go to an endpoint of another node at all; where not, nothing leads there. Pure."""
        return True

    def apply_remote(
        self, network: Network, *, add: Sequence[RemoteEndpoint], remove: Sequence[RemoteEndpoint]
    ) -> None:
        """Let packets to some endpoints of other nodes go there, and to others not any more; `remove` comes first.

        An endpoint that is there in another shape (it moved) is replaced by what is added. Called in batches as the
        cluster changes, and with what `Observed.remotes` shows to be missing or too much at start and at resync.
        """
        return

    def apply_peers(self, peers: Mapping[str, Node]) -> bool:
        """Hear from these alone: all of the other nodes that are up, by VTEP. Says whether the ways to some changed, so
        that `Observed.remotes` is to be looked at anew.
        """
        return False

    def remote_elements(self, network: Network, remote: RemoteEndpoint) -> set[Element]:
        """Return the firewall elements that an endpoint of another node needs, policies' excepted. Pure; `apply_remote`
        adds and removes them.
        """
        return set()

    def apply_key(self, private_key: str) -> str:
        """Encrypt with a private key (base64) from now on; returns the public one, "" where nothing is encrypted."""
        return ""

    @abstractmethod
    def observe(self, network: Network) -> Observed:
        """Say what the kernel holds of the network."""

    @abstractmethod
    def default_route(self, network: Network, endpoint: Endpoint, namespace: int) -> None:
        """Make the endpoint's gateway the namespace's default route."""

    def lose_default_route(self, network: Network, endpoint: Endpoint) -> None:
        """Hear that another endpoint's gateway is the namespace's default route now. By default nothing follows."""
        return

    def apply_ports(
        self, network: Network, endpoint: Endpoint, *, add: Collection[PortMapping], remove: Collection[PortMapping]
    ) -> None:
        """Publish and unpublish ports of a live endpoint.

        Raises:
            FailedPrecondition: the driver publishes none.
        """
        if add:
            raise FailedPrecondition(
                f"network {network.name} ({self.name}) publishes no ports",
                hint="use a bridge network that is not internal",
            )

    def expect_services(self, network: Network, addresses: Collection[str]) -> None:
        """Take the virtual addresses that a network's services have, the whole set. `apply_network` makes them too."""
        return

    def single(self, network: Network) -> frozenset[str]:
        """Return every address that `Observed.single` is to hold. Pure."""
        return frozenset()

    def apply_services(self, network: Network) -> None:
        """Make the virtual addresses of a network that is there those that were told, and no others."""
        return

    def node_elements(self) -> set[Element]:
        """Return the firewall elements that the node needs, whatever networks it has. Pure."""
        return set()

    def elements(self, network: Network, endpoints: Collection[Endpoint]) -> set[Element]:
        """Return the firewall elements that the network and those endpoints of it need. Pure."""
        return set()


def load_drivers(host: Host) -> dict[str, Driver]:
    """Return every driver that the entry point group `netstore.drivers` names, by its name.

    Raises:
        NetstoreError: one cannot be loaded.
    """
    drivers: dict[str, Driver] = {}
    for point in entry_points(group="netstore.drivers"):
        try:
            drivers[point.name] = point.load()(host)
        except Exception as error:
            raise NetstoreError(
                f"loading network driver {point.name} ({point.value}): {error}", hint="repair or remove its package"
            ) from error
    return drivers
