"""Docker's grammar of flags: -p, --network, -e, and sizes."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from google.protobuf.duration_pb2 import Duration

from netstore.api.v1 import common_pb2, container_pb2

__all__ = [
    "INT32",
    "Moment",
    "Period",
    "bandwidth",
    "comma_separated",
    "key_values",
    "parse_bytes",
    "parse_env",
    "parse_network",
    "parse_port",
    "parse_restart",
    "seconds",
    "truth",
]

INT32 = click.IntRange(-(1 << 31), (1 << 31) - 1)
"""A number as the contract's int32 holds it."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)i?b?", re.I)


class Period(click.ParamType[Any]):
    """A duration such as 30s, 15m or 1h30m."""

    name = "duration"

    def convert(self, value: Any, param: Any, context: Any) -> Duration:
        """Parse one."""
        if isinstance(value, Duration):
            return value
        if value != "0" and not re.fullmatch(r"([0-9]{1,9}[smhdw])+", value):
            self.fail(f"{value!r} is no duration such as 24h, 7d or 0", param, context)
        return Duration(
            seconds=sum(int(count) * _UNITS[unit] for count, unit in re.findall(r"([0-9]+)([smhdw])", value))
        )


class Moment(click.ParamType[Any]):
    """A time: RFC 3339, Unix seconds, or so long ago: 10m. In Unix seconds."""

    name = "time"

    def convert(self, value: Any, param: Any, context: Any) -> float:
        """Parse one."""
        if re.fullmatch(r"[0-9]{1,11}(\.[0-9]+)?", value):
            return float(value)
        with contextlib.suppress(ValueError):
            return max(0.0, datetime.fromisoformat(value).timestamp())
        try:
            return max(0.0, time.time() - float(Period().convert(value, None, None).ToSeconds()))
        except click.BadParameter:
            accepted = "a time (RFC 3339, Unix seconds) nor a duration such as 10m"
            self.fail(f"{value!r} is neither {accepted}", param, context)


def seconds(count: float, flag: str) -> Duration:
    """Return so many seconds; netstored says how many it takes.

    Raises:
        click.UsageError: no number, or more than the contract's durations hold.
    """
    if not abs(count) < 1 << 38:
        raise click.UsageError(f"{flag}: {count} is not accepted: write seconds, such as 10")
    return Duration(seconds=int(count), nanos=int((count - int(count)) * 1e9))


def key_values(items: Sequence[str], flag: str) -> dict[str, str]:
    """Parse KEY=VALUE items; KEY alone has an empty value."""
    found = {}
    for item in items:
        key, _, value = item.partition("=")
        if not key:
            raise click.UsageError(f"{flag}: {item!r} has no key: write KEY=VALUE")
        found[key] = value
    return found


def parse_bytes(text: str, flag: str) -> int:
    """Parse a size such as 64m or 10G, in units of 1024 as Docker (RAMInBytes)."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise click.UsageError(f"{flag}: {text!r} is no size: write a number with b, k, m, g or t")
    count = float(match[1]) * 1024 ** " kmgtp".index(match[2].lower() or " ")
    if count >= 1 << 63:
        raise click.UsageError(f"{flag}: {text!r} is more than a size can be: less than 8192p")
    return int(count)


def parse_env(items: Sequence[str], files: Sequence[str]) -> list[str]:
    """Return KEY=value of files and items; KEY alone takes our own environment's value, or is left out."""
    lines = [
        line.strip() for name in files for line in Path(name).read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]  # fmt: skip
    found = []
    for item in (*lines, *items):
        if "=" in item:
            found.append(item)
        elif item in os.environ:
            found.append(f"{item}={os.environ[item]}")
    return found


_PROTOCOLS = {"": "TCP", "tcp": "TCP", "udp": "UDP", "sctp": "SCTP"}
_PORT_GRAMMAR = "[[IP:][HOSTPORT]:]PORT[/tcp|udp|sctp], or published=…,target=…,protocol=…,host_ip=…,from=…"


def parse_port(text: str, sources: Sequence[str] = (), *, mesh: bool = False) -> list[common_pb2.PortMapping]:
    """Parse docker's -p: the short form, where ports may be ranges, or the long one of `key=value`. With `mesh` every
    node publishes it.

    A range onto a range of equal length is one mapping; a range onto a single port takes any free port of it.
    """
    if "=" in text:
        address, host, container, protocol, more = _long_port(text)
    else:
        rest, _, protocol = text.partition("/")
        address, host, container = _port_parts(rest, text)
        more = []
    first, last = _range(container, text)
    port = common_pb2.PortMapping(
        container_port=first, protocol=_protocol(protocol, text), sources=[*sources, *more], mesh=mesh
    )
    if address:
        port.host_ip = address
    port.count = last - first + 1 if last > first else 0
    if host and host != "0":  # 0 is any free one, as none
        port.host_port, end = _range(host, text)
        if end - port.host_port != last - first:
            if last > first:
                raise click.UsageError(f"-p: {text!r}: both ranges must have the same length")
            port.host_port_last = end
    return [port] if port.host_port or not port.count else _single(port)


def parse_restart(text: str) -> container_pb2.RestartPolicy:
    """Parse docker's --restart."""
    mode, _, most = text.partition(":")
    value = f"RESTART_MODE_{mode.upper().replace('-', '_')}"
    counted = mode == "on-failure" and re.fullmatch("[0-9]{1,9}", most)
    if value not in container_pb2.RestartMode.keys()[1:] or (most and not counted):
        accepted = "no, on-failure[:N], always or unless-stopped; N at most nine digits"
        raise click.UsageError(f"--restart: {text!r} is not {accepted}")
    return container_pb2.RestartPolicy(mode=value, max_retries=int(most or 0))  # type: ignore[arg-type]


def _single(port: common_pb2.PortMapping) -> list[common_pb2.PortMapping]:
    """Return a mapping for each port of a range that may go anywhere: the free ports need not be neighbours."""
    found = []
    for number in range(port.count):
        one = common_pb2.PortMapping()
        one.CopyFrom(port)
        one.count, one.container_port = 0, port.container_port + number
        found.append(one)
    return found


def _port_parts(rest: str, whole: str) -> tuple[str, str, str]:
    """Split into address, host ports and container ports; an IPv6 address may be in brackets or bare, as docker's."""
    if rest.startswith("["):
        address, closed, ports = rest[1:].partition("]:")
        host, _, container = ports.rpartition(":")
        if not closed or ":" in host:
            raise click.UsageError(f"-p: {whole!r}: write {_PORT_GRAMMAR}")
        return address, host, container
    rest, _, container = rest.rpartition(":")
    address, _, host = rest.rpartition(":")
    return address, host, container


def _protocol(text: str, whole: str) -> Any:
    if text.lower() not in _PROTOCOLS:
        raise click.UsageError(f"-p: {whole!r}: the protocol is tcp, udp or sctp")
    return common_pb2.Protocol.Value(f"PROTOCOL_{_PROTOCOLS[text.lower()]}")


def comma_separated(text: str, flag: str) -> list[str]:
    """Split the `key=value,…` of a flag, as docker does by CSV: a part with commas stands in quotes."""
    try:
        return next(csv.reader([text], strict=True))
    except (csv.Error, StopIteration) as error:
        raise click.UsageError(f"{flag}: {text!r}: write key=value,…, with quotes around commas") from error


def _long_port(text: str) -> tuple[str, str, str, str, list[str]]:
    """Split the long form into host address, host ports, container ports, protocol and sources."""
    given = {"host_ip": "", "published": "", "target": "", "protocol": ""}
    sources = []
    for part in comma_separated(text, "-p"):
        key, _, value = part.partition("=")
        if key in given and value:
            given[key] = value
        elif key == "from" and value:
            sources.append(value)
        elif key != "mode" or value not in ("host", "ingress"):
            raise click.UsageError(f"-p: {text!r}: {part!r} is not known: write {_PORT_GRAMMAR}")
    address = given["host_ip"].removeprefix("[").removesuffix("]")
    return address, given["published"], given["target"], given["protocol"], sources


def _range(text: str, whole: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise click.UsageError(f"-p: {whole!r}: write {_PORT_GRAMMAR}")
    numbers = int(first), int(last or first)
    if not 1 <= numbers[0] <= numbers[1] <= 65535:
        raise click.UsageError(f"-p: {whole!r}: ports are 1 to 65535, a range the smaller first")
    return numbers


def bandwidth(incoming: str | None, outgoing: str | None) -> dict[str, str]:
    """Return the endpoint options of --bandwidth-in and --bandwidth-out."""
    given = {"in": incoming, "out": outgoing}
    return {f"netstore.endpoint.bandwidth_{way}": value for way, value in given.items() if value}


def truth(text: str, flag: str) -> bool:
    """Parse true or false, as docker's flags that take a value."""
    if text.lower() in ("true", "1", "t"):
        return True
    if text.lower() in ("false", "0", "f"):
        return False
    raise click.UsageError(f"{flag}: {text!r}: true or false")


def _int32(text: str, what: str) -> int:
    if not re.fullmatch("-?[0-9]{1,10}", text) or not -(1 << 31) <= int(text) < 1 << 31:
        raise click.UsageError(f"{what}: {text!r} is no whole number of 32 bits")
    return int(text)


def parse_network(text: str) -> container_pb2.NetworkAttachment:
    """Parse `NAME`, or `name=NAME,alias=…,ip=…,ip6=…` and the like. Values keep their case."""
    if "=" not in text:
        return container_pb2.NetworkAttachment(network=text)
    attachment = container_pb2.NetworkAttachment()
    for part in comma_separated(text, "--network"):
        key, _, value = part.partition("=")
        fields: dict[str, Any] = {
            "name": "network", "ip": "ipv4_address", "ip6": "ipv6_address", "mac-address": "mac_address",
            "ifname": "interface_name",
        }  # fmt: skip
        if key in fields:
            setattr(attachment, fields[key], value)
        elif key == "alias":
            attachment.aliases.append(value)
        elif key == "link-local-ip":
            attachment.link_local_addresses.append(value)
        elif key == "driver-opt":
            name, _, text_ = value.partition("=")
            attachment.options[name] = text_
        elif key == "gw-priority":
            attachment.gateway_priority = _int32(value, f"--network: {part!r}")
        else:
            raise click.UsageError(
                f"--network: {part!r}: keys are name, alias, ip, ip6, mac-address, ifname, link-local-ip, driver-opt, "
                "gw-priority"
            )
    if not attachment.network:
        raise click.UsageError(f"--network: {text!r} names no network: add name=…")
    return attachment
