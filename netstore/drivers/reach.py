"""Who can reach a published port: said from what the firewall does, for `inspect` and `port ls`.

It knows the bind address, the sources that are let in, and the network's gateway modes and isolation. What policies or
the host's own firewall drop besides is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator

from netstore.drivers.bridged import ISOLATE, MODES, TRUSTED
from netstore.model import Endpoint, Network, PortMapping, Protocol, Reach

__all__ = ["reach"]

NODE, NETWORKS, ANYONE = "node", "networks", "anyone"


def reach(network: Network, endpoint: Endpoint, port: PortMapping) -> list[Reach]:
    """Return where a port answers, and whom there; nothing where nobody is answered."""
    return [*_on_the_host(network, endpoint, port), *_at_its_address(network, endpoint, port)]


def _on_the_host(network: Network, endpoint: Endpoint, port: PortMapping) -> Iterator[Reach]:
    """Yield the node's own addresses that are translated."""
    last = f"-{port.host_port + port.count - 1}" if port.count > 1 else ""
    translated = {version for version in _families(endpoint) if _mode(network, version) not in ("routed", "isolated")}
    if not translated:
        return
    place = f"[{port.host_ip}]" if ":" in port.host_ip else port.host_ip or "*"
    relayed = port.protocol is Protocol.TCP
    if port.host_ip.startswith("127.") or port.host_ip == "::1":
        if relayed or port.host_ip != "::1":
            yield Reach(address=f"{place}:{port.host_port}{last}", sources=(NODE,))
        return
    wide = tuple(port.sources) or _all(network)
    if port.host_ip or translated == {4, 6}:
        yield Reach(address=f"{place}:{port.host_port}{last}", sources=(NODE, *wide))
        return
    version = translated.pop()
    everywhere = {4: "0.0.0.0", 6: "[::]"}[version]
    yield Reach(address=f"{everywhere}:{port.host_port}{last}", sources=(NODE, *wide))
    if version == 4 and relayed:
        yield Reach(address=f"[::1]:{port.host_port}{last}", sources=(NODE,))


def _at_its_address(network: Network, endpoint: Endpoint, port: PortMapping) -> Iterator[Reach]:
    """Yield the endpoint's own addresses: the node always, others where they are not translated for."""
    last = f"-{port.container_port + port.count - 1}" if port.count > 1 else ""
    trusted = tuple(f"interface {name}" for name in network.spec.options.get(TRUSTED, "").split(":") if name)
    for version, address in _families(endpoint).items():
        if port.host_ip and (":" in port.host_ip) != (version == 6):
            continue
        mode = _mode(network, version)
        place = f"[{address}]" if version == 6 else address
        wide = _all(network) if mode in ("routed", "nat-unprotected") else trusted
        if mode in ("routed", "nat-unprotected") and port.sources:
            wide = tuple(source for source in port.sources if (":" in source) == (version == 6))
        if wide:
            yield Reach(address=f"{place}:{port.container_port}{last}", sources=(NODE, *wide))


def _all(network: Network) -> tuple[str, ...]:
    """Return who is answered where nobody is left out."""
    return (ANYONE,) if network.spec.options.get(ISOLATE) == "strict" else (NETWORKS, ANYONE)


def _families(endpoint: Endpoint) -> dict[int, str]:
    """Return the first address of each family: those that are published."""
    found: dict[int, str] = {}
    for each in endpoint.addresses:
        found.setdefault(6 if ":" in each.address else 4, each.address)
    return found


def _mode(network: Network, version: int) -> str:
    return network.spec.options.get(MODES[version], "nat")
