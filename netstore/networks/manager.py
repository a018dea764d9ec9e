"""The network manager: networks, endpoints and sandboxes of a node, and the reconciler that keeps them real."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from netstore.config import ClusterConfig
from netstore.drivers.base import Host, load_drivers
from netstore.drivers.options import parse
from netstore.errors import InvalidArgument, KernelError
from netstore.kernel.firewall import Firewall, relay_elements
from netstore.kernel.links import Deletions, host_socket, node_link
from netstore.kernel.sandboxes import open_relay
from netstore.kernel.sysctls import raise_neighbour_limits
from netstore.model import Endpoint, Finding, Network, NodeCheck, Sandbox, Scope
from netstore.networks.cluster.balanced import Balanced
from netstore.networks.cluster.checks import Checks, told
from netstore.networks.cluster.cluster import Cluster, Work
from netstore.networks.cluster.dataplane import DataPlane
from netstore.networks.cluster.keys import Keys
from netstore.networks.cluster.members import no_cluster
from netstore.networks.cluster.publication import Publication
from netstore.networks.cluster.span import Span
from netstore.networks.cluster.spanning import Spanning
from netstore.networks.context import Context
from netstore.networks.drops import Drops
from netstore.networks.endpoints import Endpoints
from netstore.networks.handover import RELAY, ResolverLink
from netstore.networks.ipam import DEFAULT_POOLS, GLOBAL_POOLS, AddressPool, unique_local_pool
from netstore.networks.leases import Leases
from netstore.networks.networks import Networks
from netstore.networks.offers import Offers
from netstore.networks.policies import Policies
from netstore.networks.reconcile import Reconciler
from netstore.networks.sandboxes import Sandboxes
from netstore.networks.services import Services
from netstore.networks.supervision import ResolverProcess
from netstore.networks.uplink import DEFAULT_MTU, read_uplink
from netstore.store import Store

__all__ = ["NetworkManager"]

log = structlog.get_logger(__name__)


class NetworkManager:
    """Owns what its parts share. Must be made in the daemon's own network namespace.

    `pools` are what networks without a subnet take theirs from: those of a family that is not in it are the defaults.
    `resolver` is the command that starts netstore-resolver, () where somebody else does. `docker_user` lets our
    networks through Docker's forward chain. `key_file` holds the node's key of WireGuard.

    Raises:
        NetstoreError: a file of the cluster's certificates cannot be read.
    """

    def __init__(
        self, store: Store, run_dir: Path, key_file: Path, *,
        node_id: str, pools: Sequence[AddressPool] = (), resolver: Sequence[str] = (),
        docker_user: bool = False, cluster: ClusterConfig | None = None,
        options: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:  # fmt: skip
        self._firewall = Firewall()
        self.resolver = ResolverLink(run_dir, ResolverProcess(resolver) if resolver else None)
        host = Host(self._firewall, Deletions(), self.resolver.relay_port)
        if cluster:
            vxlan, wireguard = cluster.data_path_port, cluster.wireguard_port
            host = replace(host, vtep=cluster.advertise, vxlan_port=vxlan, wireguard_port=wireguard)
        drivers = load_drivers(host)
        defaults = (*DEFAULT_POOLS, unique_local_pool(node_id))
        given = {base.version for base, _ in pools}
        pools = (*pools, *(pool for pool in defaults if pool[0].version not in given))
        spanning = (*GLOBAL_POOLS, unique_local_pool(node_id))
        self._context = Context(store, drivers, self.resolver, run_dir / "netns", pools, spanning, options or {})
        for name, values in self._context.options.items():
            if name not in drivers:
                raise InvalidArgument("default-network-opts.DRIVER", name, f"one of {', '.join(sorted(drivers))}")
            parse(drivers[name].options, values, field=f"default-network-opts.{name}")
        self.policies = Policies(self._context, self._firewall)
        self.services = Services(self._context, self._firewall)
        self.drops = Drops(self._context, self._firewall.policing)
        self._span = self._build_span(cluster, node_id, key_file) if cluster else None
        if self._span:
            self.services.join(self._span)
        self.networks = Networks(self._context, self.policies, self._span)
        self.offers = Offers(self._context)
        self.sandboxes = Sandboxes(self._context)
        self._leases = Leases(self._context, self.sandboxes)
        self.endpoints = Endpoints(
            self._context, self.sandboxes, self.policies, self._leases, self._span, self.services.touch
        )
        self._reconciler = Reconciler(
            self._context,
            self._firewall,
            self.endpoints,
            self.sandboxes,
            self.services,
            self._span,
            docker_user=docker_user,
        )

    @property
    def drivers(self) -> list[str]:
        """Names of the network drivers."""
        return sorted(self._context.drivers)

    async def start(self) -> None:
        """Make the firewall's skeleton and the predefined networks, then everything that the store holds."""
        self._context.netns_dir.mkdir(parents=True, exist_ok=True)
        await self.resolver.start()
        await self.drops.start()
        await self.policies.start()
        await self._context.apply(self._firewall.ensure)
        await self._give_relay()
        try:
            await self._context.apply(raise_neighbour_limits)
        except KernelError as error:  # a read-only /proc/sys
            log.warning("neighbour tables keep their size", error=str(error))
        await self.networks.start()
        if self._span:
            await self._span.keys.start()
            await self._tell_link(self._span.cluster)
            await self._span.data_plane.apply_peers()  # before the check would take what is there for too much
        await self.services.start()
        await self.check(repair=True)
        await self._leases.start()
        if self._span:
            self._span.publication.evict = self.endpoints.detach
            self._span.publication.unpublish = self.endpoints.unpublish
            self._span.data_plane.change = self.networks.take_over
            plane, publication = self._span.data_plane, self._span.publication
            answer = self._checks(self._span.cluster).answer
            stray, rotate = publication.release_stray, self._span.keys.rotate
            self._span.cluster.start(Work(plane.follow, plane.resync, self._publish, rotate, stray, answer))

    def _build_span(self, config: ClusterConfig, node_id: str, key_file: Path) -> Span:
        store = self._context.store
        cluster = Cluster(config, store, node_id, self._localise)
        plane = DataPlane(self._context, node_id, self.policies, self.services)
        networks, services = Spanning(self._context, cluster, plane), Balanced(store, cluster)
        self.policies.share = networks.change_policies
        keys = Keys(key_file, self._context, cluster, config.rotation_seconds())
        return Span(cluster, networks, services, Publication(store, cluster, self._context.locks), plane, keys)

    @property
    def cluster(self) -> Cluster | None:
        """The cluster that this node is in."""
        return self._span.cluster if self._span else None

    def require_cluster(self) -> Cluster:
        """Return the cluster that this node is in.

        Raises:
            FailedPrecondition: it is in none.
        """
        if self.cluster is None:
            raise no_cluster()
        return self.cluster

    def _localise(self, network: Network) -> Network:
        """Fill in what is this node's own of a network of the cluster."""
        driver = self._context.driver(network.spec.driver)
        return driver.validate(replace(network, mtu=read_uplink().mtu or DEFAULT_MTU))

    async def _publish(self) -> None:
        assert self._span
        unfinished = await self._span.networks.finish()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._span.networks.put_back(unfinished), name="cluster recovery")
            group.create_task(self._span.publication.publish(), name="cluster changes")

    async def _give_relay(self) -> None:
        """Open the socket of the relay of [::1], if netstore-resolver does not hold it from before."""
        if not self.resolver.relay_port() and (listener := open_relay()):
            await self.resolver.add(RELAY, listener)
            elements = list(relay_elements(self.resolver.relay_port()))
            await self._context.apply(self._firewall.remove, elements)  # the port of one that is gone
            await self._context.apply(self._firewall.add, elements)

    async def check(self, *, repair: bool) -> list[Finding]:
        """Compare kernel and store; see `Reconciler.check`."""
        return await self._reconciler.check(repair=repair)

    def _checks(self, cluster: Cluster) -> Checks:
        return Checks(self._context, cluster, self._reconciler.examine)

    async def check_network(self, reference: str) -> list[NodeCheck]:
        """Compare kernel and store of one network, on every node where it spans nodes, and probe each pair of them."""
        network, _ = await self.networks.get(reference)
        if self._span and network.scope is Scope.GLOBAL:
            return await self._checks(self._span.cluster).ask(network)
        findings = await self._reconciler.examine(network)
        node_id = self.cluster.node.id if self.cluster else ""
        return [NodeCheck(node_id=node_id, used=True, mtu=network.mtu, findings=told(network, findings))]

    async def missing(self, endpoint: Endpoint, network: Network, sandbox: Sandbox) -> str:
        """Say what the kernel lacks of an attached endpoint; see `Reconciler.missing`."""
        return await self._reconciler.missing(endpoint, network, sandbox)

    async def lost(self, endpoint_ids: Collection[str]) -> bool:
        """Say whether one of these endpoints, whose interface went away, should be attached: we did not detach it."""
        marks = ", ".join("?" * len(endpoint_ids))
        found = await self._context.store.read(lambda tx: tx.endpoints.all(f"id IN ({marks})", *endpoint_ids))
        return any(endpoint.attached for endpoint in found)

    async def stale(self) -> bool:
        """Say whether a namespace that an engine named is gone, and its endpoints are left."""
        return await self._reconciler.stale()

    async def _tell_link(self, cluster: Cluster) -> None:
        link, _, _ = await self._context.apply(node_link, cluster.node.address)
        await cluster.set_link(link)

    async def follow_uplink(self) -> int:
        """Make networks follow the uplink's MTU (`Networks.follow_uplink`), and where the node is on the underlay."""
        if self._span:
            await self._tell_link(self._span.cluster)
            await self._span.data_plane.follow_peers()
        return await self.networks.follow_uplink()

    async def parents(self) -> frozenset[int]:
        """Return the indexes of the parents of networks (macvlan); 0 for one that is away."""
        drivers = self._context.drivers
        networks = await self._context.store.read(lambda tx: tx.networks.all())
        names = {each.interface for each in networks if drivers[each.spec.driver].ends_inside}
        return await self._context.apply(lambda: frozenset(host_socket().index_of(name) or 0 for name in names))

    async def close(self) -> None:
        """Let go of the resolver and the executors; what is in the kernel stays and works on."""
        if self.cluster:
            await self.cluster.close()
        await self.services.close()
        await self._leases.close()
        await self.drops.close()
        await self.resolver.close()
        self._context.close()
