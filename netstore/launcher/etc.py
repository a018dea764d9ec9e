"""The three files of /etc that a container has of its own: hosts, hostname, resolv.conf, as Docker keeps them.

They are bind-mounted, so that a later write goes into the same file: a container that runs sees it at once. They are
made anew at every start. While the container runs, lines of /etc/hosts come and go with its endpoints and whatever it
wrote there itself stays; a resolv.conf that it edited is left alone. What was written last is kept beside, in `.hosts`
and `.resolv.conf`, to tell.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from netstore.errors import KernelError
from netstore.kernel.inotify import PathWatch
from netstore.kernel.sandboxes import RESOLVER_ADDRESS
from netstore.launcher.links import Link, read_links
from netstore.model import ContainerSpec, Endpoint, Network, Sandbox
from netstore.networks.vantage import host_addresses
from netstore.store import Transaction

__all__ = ["Etc", "host_changes", "read_etc", "refresh", "write"]

log = structlog.get_logger(__name__)

_HOST_RESOLV_CONF = Path("/etc/resolv.conf")
_BEHIND_STUB = Path("/run/systemd/resolve/resolv.conf")  # what systemd-resolved's 127.0.0.53 asks (its documentation)
_FALLBACK_SERVERS = ("8.8.8.8", "8.8.4.4")  # Docker's, where the host has none that a container reaches
_HOST_NAMES = "host.docker.internal host.netstore.internal"
_LOOPBACK = (
    "127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback", "fe00::\tip6-localnet",
    "ff00::\tip6-mcastprefix", "ff02::1\tip6-allnodes", "ff02::2\tip6-allrouters",
)  # fmt: skip
_HEADER = "# Made by netstore. While the container runs, an edited file is left alone."
_SETTLE_SECONDS = 0.1
_MAX_BYTES = 1 << 20
"""A container may write what it likes into its files; of a longer one nothing is read."""


@dataclass(frozen=True, slots=True)
class Etc:
    """What the files are made from. `on_host` says that the network is the host's, whose files then serve."""

    spec: ContainerSpec
    hostname: str
    endpoints: Sequence[tuple[Endpoint, Network]]
    on_host: bool
    links: Sequence[Link] = ()

    @property
    def gateways(self) -> list[str]:
        """The host, as the container sees it."""
        if self.on_host:
            return ["127.0.0.1"]
        return host_addresses(
            (endpoint.default_route, _reached(network), [f"{a.address}/{a.prefix}" for a in endpoint.addresses])
            for endpoint, network in self.endpoints
        )

    @property
    def named(self) -> bool:
        """Whether netstore-resolver answers inside."""
        return any(not network.predefined for _, network in self.endpoints)


def _reached(network: Network) -> Sequence[str]:
    return network.host_seen_at or [each.address for each in network.host_addresses]


def read_etc(tx: Transaction, sandbox: Sandbox) -> Etc:
    """Return what the files of a sandbox are made from: those who joined it share them, as Docker has it."""
    owner = tx.containers.require(sandbox.container_id)
    endpoints = tx.endpoints.all("sandbox_id = ?", sandbox.id)
    pairs = [(endpoint, tx.networks.require(endpoint.network_id)) for endpoint in endpoints]
    on_host = not sandbox.path
    hostname = owner.spec.hostname or (os.uname().nodename if on_host else owner.id[:12])
    return Etc(owner.spec, hostname, pairs, on_host, read_links(tx, pairs))


async def host_changes() -> AsyncIterator[None]:
    """Yield whenever the host's resolv.conf has changed, once it has settled."""
    try:
        with PathWatch(_HOST_RESOLV_CONF) as watch:
            while True:
                await watch.changed.wait()
                await asyncio.sleep(_SETTLE_SECONDS)
                watch.changed.clear()
                yield
    except (OSError, KernelError) as error:
        log.error("the host's resolv.conf is not followed", reason=str(error))


def write(place: Path, etc: Etc) -> None:
    """Write the three files into a container's directory, anew."""
    (place / "hostname").write_text(f"{etc.hostname}\n")
    for name, text in (("hosts", _hosts(etc)), ("resolv.conf", _resolv_conf(etc))):
        _overwrite(place, name, text, text)


def refresh(place: Path, etc: Etc) -> None:
    """Make the files of a running container follow its endpoints, and keep what it wrote itself."""
    hosts, resolv_conf = _hosts(etc), _resolv_conf(etc)
    before, present = _read(place / ".hosts"), _read(place / "hosts")
    if hosts != before and present is not None:
        _overwrite(place, "hosts", _merged(present, before or "", hosts), hosts)
    before = _read(place / ".resolv.conf")
    if resolv_conf != before and _read(place / "resolv.conf") == before:
        _overwrite(place, "resolv.conf", resolv_conf, resolv_conf)


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    return data.decode(errors="surrogateescape") if len(data) <= _MAX_BYTES else None


def _overwrite(place: Path, name: str, text: str, ours: str) -> None:
    """Write a file in place, for it is mounted, and remember what of it is ours."""
    (place / name).write_bytes(text.encode(errors="surrogateescape"))
    (place / f".{name}").write_text(ours)


def _merged(present: str, before: str, after: str) -> str:
    """Return the lines of `present` without those that went from `before` to `after`, and with those that came."""
    gone = Counter(before.splitlines()) - Counter(after.splitlines())
    come = Counter(after.splitlines()) - Counter(before.splitlines())
    kept = []
    for line in present.splitlines():
        if gone[line] > 0:
            gone[line] -= 1
        else:
            kept.append(line)
    return "".join(f"{line}\n" for line in [*kept, *come.elements()])


def _hosts(etc: Etc) -> str:
    lines = _lines(Path("/etc/hosts")) if etc.on_host else list(_LOOPBACK)
    for entry in etc.spec.extra_hosts:
        name, _, address = entry.partition("=")
        addresses = etc.gateways if address == "host-gateway" else [address]
        lines += [f"{each}\t{name}" for each in addresses]
    lines += [f"{address}\t{' '.join(link.names)}" for link in etc.links for address in link.addresses]
    if not etc.named:  # nobody answers names there, so these are written down
        lines += [f"{gateway}\t{_HOST_NAMES}" for gateway in etc.gateways]
    full = f"{etc.hostname}.{etc.spec.domainname}" if etc.spec.domainname else etc.hostname
    own = " ".join(dict.fromkeys((full, full.split(".")[0])))
    lines += [f"{address.address}\t{own}" for endpoint, _ in etc.endpoints for address in endpoint.addresses]
    return "".join(f"{line}\n" for line in lines)


def _resolv_conf(etc: Etc) -> str:
    """Return the container's resolv.conf; where names are answered inside, the servers are the resolver's to ask."""
    lines = _lines(_HOST_RESOLV_CONF)
    spec = etc.spec
    if etc.on_host and not (spec.dns_servers or spec.dns_search or spec.dns_options):
        return "".join(f"{line}\n" for line in lines)
    words = [line.split() for line in lines if line.strip() and line[0] not in "#;"]
    servers = [RESOLVER_ADDRESS] if etc.named else list(spec.dns_servers) or _servers(words, on_host=etc.on_host)
    kept = [_HEADER, *(f"nameserver {server}" for server in servers)]
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


def _servers(words: Sequence[Sequence[str]], *, on_host: bool) -> list[str]:
    """Return the host's name servers, as far as they can be reached."""
    found = [each[1] for each in words if each[0] == "nameserver" and len(each) > 1]
    if on_host:
        return found
    for each in (words, [line.split() for line in _lines(_BEHIND_STUB)]):
        found = [line[1] for line in each if len(line) > 1 and line[0] == "nameserver"]
        reached = [server for server in found if not server.startswith(("127.", "::1"))]
        if reached:
            return reached
    return list(_FALLBACK_SERVERS)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
