"""Option tables: one declaration from which validation, typed values and the reference page come."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from netstore.errors import Immutable, InvalidArgument

__all__ = [
    "BANDWIDTHS",
    "BANDWIDTH_IN",
    "BANDWIDTH_OUT",
    "ENDPOINT_OPTIONS",
    "INTERFACE",
    "MAC_ADDRESS",
    "SYSCTLS",
    "Option",
    "boolean",
    "choice",
    "hidden",
    "inner_interface",
    "interface",
    "interfaces",
    "ipv4",
    "ipv6",
    "mac",
    "mode",
    "number",
    "parse",
    "rate",
    "refuse_changes",
    "shown",
    "size_bytes",
]

_INTERFACE = re.compile(r"[a-zA-Z0-9_.-]{1,15}")
_SIZE = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,9})?)\s*([kmgtp]?)i?b?")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kmg]?)(?:bit)?")
_SECRET = re.compile(r"((?:^|,)(?:password2?|pass|secret)=)[^,]*")
_SYSCTL = re.compile(r"(net\.(?:ipv4|ipv6|mpls)\.[a-z_]+\.IFNAME\.[a-z0-9_]+)=(-?[0-9]+)")


@dataclass(frozen=True, slots=True)
class Option:
    """One driver option: its key, how its text becomes a value, what it is when absent, what it does.

    `parse` raises ValueError with what would be accepted. `live` says that it may change while the network is used.
    """

    key: str
    parse: Callable[[str], Any]
    default: Any
    doc: str
    live: bool = False


def parse(table: Sequence[Option], options: Mapping[str, str], *, field: str = "spec.options") -> dict[str, Any]:
    """Return a value for every key of the table.

    Raises:
        InvalidArgument: an unknown key, or a value that its option does not take.
    """
    known = {option.key: option for option in table}
    values = {option.key: option.default for option in table}
    for key, text in options.items():
        if key not in known:
            accepted = ", ".join(sorted(known)) or "none"
            raise InvalidArgument(field, key, f"options of this driver: {accepted}", reason="UNKNOWN_OPTION")
        try:
            values[key] = known[key].parse(text)
        except ValueError as error:
            raise InvalidArgument(f"{field}[{key}]", hidden(text), str(error)) from error
    return values


def refuse_changes(table: Sequence[Option], present: Mapping[str, str], asked: Mapping[str, str]) -> None:
    """Refuse a change of an option that is not live.

    Raises:
        Immutable: naming it.
    """
    live = {option.key for option in table if option.live}
    for key in sorted({*present, *asked} - live):
        if present.get(key) != asked.get(key):
            raise Immutable(f"spec.options[{key}]", ", ".join(sorted(live)))


def boolean(text: str) -> bool:
    """Parse as Docker does (strconv.ParseBool)."""
    if text.lower() in ("1", "t", "true"):
        return True
    if text.lower() in ("0", "f", "false"):
        return False
    raise ValueError("true or false")


def number(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `low` to `high`."""

    def parse_number(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return parse_number


def mode(text: str) -> int:
    """Parse a file mode, octal."""
    if not re.fullmatch(r"[0-7]{1,5}", text) or int(text, 8) > 0o7777:
        raise ValueError("an octal file mode such as 0750")
    return int(text, 8)


def shown(default: object) -> str:
    """Return a default as it is written in an option, "" for none."""
    return str(default).lower() if isinstance(default, bool) else str(default or "")


def hidden(value: str) -> str:
    """Return an option's value with asterisks for passwords: mount.cifs(8), and the key of mount.ceph(8)."""
    return _SECRET.sub(r"\1*****", value)


def size_bytes(text: str) -> int:
    """Parse a size such as 64m or 10G, in units of 1024 as Docker (RAMInBytes)."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or (size := int(float(match[1]) * 1024 ** " kmgtp".index(match[2] or " "))) >= 1 << 63:
        raise ValueError("a size such as 512M or 10G")
    return size


def interface(text: str) -> str:
    """Parse an interface name (dev_valid_name in the kernel)."""
    if not _INTERFACE.fullmatch(text) or text in (".", ".."):
        raise ValueError("an interface name: 1 to 15 letters, digits, '_', '.', '-'")
    return text


def inner_interface(text: str) -> str:
    """Parse the name of an interface in a sandbox."""
    if text in ("lo", "all", "default"):  # these have another meaning in /proc/sys/net
        raise ValueError("a name other than lo, all, default")
    return interface(text)


def mac(text: str) -> str:
    """Parse a unicast MAC address."""
    if not _MAC.fullmatch(text) or int(text[:2], 16) & 1 or text == "00:00:00:00:00:00":
        raise ValueError("a unicast MAC address such as 02:42:ac:11:00:02")
    return text


def ipv4(text: str) -> str:
    """Parse an IPv4 address; the unspecified one becomes ""."""
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError as error:
        raise ValueError("an IPv4 address") from error
    return "" if address.is_unspecified else str(address)


def ipv6(text: str) -> str:
    """Parse an IPv6 address; the unspecified one becomes ""."""
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError as error:
        raise ValueError("an IPv6 address") from error
    return "" if address.is_unspecified else str(address)


def choice(*words: str) -> Callable[[str], str]:
    """Return a parser of one word of several."""

    def parse_choice(text: str) -> str:
        if text not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return text

    return parse_choice


def interfaces(text: str) -> tuple[str, ...]:
    """Parse interface names separated by ':'."""
    return tuple(interface(name) for name in text.split(":") if name)


def sysctls(text: str) -> tuple[tuple[str, str], ...]:
    """Parse settings of the endpoint's own interface, as paths below /proc/sys with their values."""
    found = []
    for part in text.split(","):
        match = _SYSCTL.fullmatch(part.strip())
        if match is None:
            raise ValueError("net.ipv4.conf.IFNAME.SETTING=NUMBER and the like, separated by commas")
        found.append((match[1].replace(".", "/"), match[2]))
    return tuple(found)


def rate(text: str) -> int:
    """Parse a rate such as 50mbit (as tc: k, m, g are powers of 1000) into bytes a second; "" and 0 are no limit."""
    match = _RATE.fullmatch(text.lower())
    if match is None or (bits := int(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[match[2]])) > 10**12:
        raise ValueError("a rate such as 512kbit, 50mbit or 1.5gbit")
    if 0 < bits < 8000:
        raise ValueError("at least 8kbit, or 0 for no limit")
    return bits // 8


BANDWIDTH_IN, BANDWIDTH_OUT = "netstore.endpoint.bandwidth_in", "netstore.endpoint.bandwidth_out"
INTERFACE, MAC_ADDRESS = "com.docker.network.endpoint.ifname", "com.docker.network.endpoint.macaddress"
SYSCTLS = "com.docker.network.endpoint.sysctls"
BANDWIDTHS = (
    Option(BANDWIDTH_IN, rate, 0, "most that it receives, such as 50mbit; 0 is no limit", live=True),
    Option(BANDWIDTH_OUT, rate, 0, "most that it sends", live=True),
)
ENDPOINT_OPTIONS: Sequence[Option] = (
    Option(SYSCTLS, sysctls, (), "settings of the interface in the container; IFNAME stands for its name"),
    Option(INTERFACE, inner_interface, "", "name of the interface in the container; the same as its own field"),
    Option(MAC_ADDRESS, mac, "", "its MAC address; the same as its own field"),
    *BANDWIDTHS,
)
"""Options of an endpoint, on every driver that makes interfaces."""
