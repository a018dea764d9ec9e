"""The three files of /etc that a container has of its own: hosts, hostname, resolv.conf, as Docker keeps them.

They are bind-mounted, so that a later write goes into the same file: a container that runs sees it at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from netstore.kernel.sandboxes import RESOLVER_ADDRESS
from netstore.model import ContainerSpec, Endpoint, Network

__all__ = ["Etc", "write"]

_HOST_RESOLV_CONF = Path("/etc/resolv.conf")
_HOST_NAMES = "host.docker.internal host.netstore.internal"
_LOOPBACK = (
    "127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback", "fe00::\tip6-localnet",
    "ff00::\tip6-mcastprefix", "ff02::1\tip6-allnodes", "ff02::2\tip6-allrouters",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Etc:
    """What the files are made from. `on_host` says that the network is the host's, whose files then serve."""

    spec: ContainerSpec
    hostname: str
    endpoints: Sequence[tuple[Endpoint, Network]]
    on_host: bool

    @property
    def gateways(self) -> list[str]:
        """The host, as the container sees it: the gateways of the endpoint that has the default route, or of any."""
        if self.on_host:
            return ["127.0.0.1"]
        ordered = sorted(self.endpoints, key=lambda pair: not pair[0].default_route)
        return next((found for endpoint, _ in ordered if (found := [a.gateway for a in endpoint.addresses])), [])

    @property
    def named(self) -> bool:
        """Whether netstore-resolver answers inside."""
        return any(not network.predefined for _, network in self.endpoints)


def write(place: Path, etc: Etc) -> None:
    """Write the three files into a container's directory."""
    for name, text in (("hostname", f"{etc.hostname}\n"), ("hosts", _hosts(etc)), ("resolv.conf", _resolv_conf(etc))):
        (place / name).write_text(text)


def _hosts(etc: Etc) -> str:
    lines = Path("/etc/hosts").read_text().splitlines() if etc.on_host else list(_LOOPBACK)
    full = f"{etc.hostname}.{etc.spec.domainname} " if etc.spec.domainname else ""
    for entry in etc.spec.extra_hosts:
        name, _, address = entry.partition("=")
        addresses = etc.gateways if address == "host-gateway" else [address]
        lines += [f"{each}\t{name}" for each in addresses]
    if not etc.named:  # nobody answers names there, so these are written down
        lines += [f"{gateway}\t{_HOST_NAMES}" for gateway in etc.gateways]
    own = [address.address for endpoint, _ in etc.endpoints for address in endpoint.addresses]
    lines += [f"{address}\t{full}{etc.hostname}" for address in own]
    return "".join(f"{line}\n" for line in lines)


def _resolv_conf(etc: Etc) -> str:
    """Return the container's resolv.conf; where names are answered inside, the servers are the resolver's to ask."""
    try:
        lines = _HOST_RESOLV_CONF.read_text().splitlines()
    except FileNotFoundError:
        lines = []
    spec = etc.spec
    if etc.on_host and not (spec.dns_servers or spec.dns_search or spec.dns_options):
        return "".join(f"{line}\n" for line in lines)
    words = [line.split() for line in lines if line.strip() and line[0] not in "#;"]
    servers = [each[1] for each in words if each[0] == "nameserver" and len(each) > 1]
    if not etc.on_host:  # without those that only the host reaches
        servers = [server for server in servers if not server.startswith(("127.", "::1"))]
    servers = [RESOLVER_ADDRESS] if etc.named else list(spec.dns_servers) or servers
    kept = [f"nameserver {server}" for server in servers]
    search = [word for word in spec.dns_search if word != "."]
    if spec.dns_search:
        kept += [f"search {' '.join(search)}"] if search else []
    else:
        kept += [" ".join(each) for each in words if each[0] in ("search", "domain")]
    options = list(spec.dns_options) or [option for each in words if each[0] == "options" for option in each[1:]]
    if etc.named and not any(option.startswith("ndots:") for option in options):
        options.append("ndots:0")
    kept += [f"options {' '.join(options)}"] if options else []
    return "".join(f"{line}\n" for line in kept)
