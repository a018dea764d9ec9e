"""Checks of request fields that every service has, and lists in pages."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Protocol, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from netstore.errors import Immutable, InvalidArgument, NotFound
from netstore.model import label_matches

__all__ = [
    "Filters",
    "check_labels",
    "check_mask",
    "check_name",
    "check_period",
    "check_request_id",
    "check_servers",
    "duration",
    "missing_allowed",
    "next_page",
    "page",
    "page_bounds",
    "timestamp",
]

T = TypeVar("T")

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")
_DOMAIN = re.compile(r"[a-zA-Z0-9_-]+(\.[a-zA-Z0-9_-]+)*")
_SERVER = re.compile(
    r"\[(?P<bracketed>[0-9a-fA-F:.]+)\](:(?P<port>\d{1,5}))?|(?P<v4>[0-9.]+)(:(?P<port4>\d{1,5}))?|(?P<bare>[0-9a-fA-F:.]+)"
)
_REQUEST_ID = re.compile(r"[0-9a-fA-F-]{32,36}")
_ID_BEGINS = "substr(id, 1, length(?)) = ?"
_NAME_HAS = "instr(? || name || ?, ?)"
_MARK = "/"
_LABEL = "EXISTS (SELECT 1 FROM json_each(body, '$.labels') WHERE key = ?)"
_LABEL_IS = "EXISTS (SELECT 1 FROM json_each(body, '$.labels') WHERE key = ? AND value = ?)"
_DEFAULT_PAGE, _MAX_PAGE = 50, 1000
_LONGEST_PERIOD = 10 * 365 * 86400


def check_name(field: str, value: str, *, otherwise: str = "") -> str:
    """Return a name that keeps the rule of common.proto; `otherwise` is what else would be accepted there.

    Raises:
        InvalidArgument: it does not.
    """
    if not _NAME.fullmatch(value):
        accepted = "letters, digits, '_', '.', '-'; the first a letter or digit; at most 128"
        raise InvalidArgument(field, value, f"{accepted}; {otherwise}" if otherwise else accepted)
    return value


def check_labels(labels: Mapping[str, str], *, field: str = "labels") -> dict[str, str]:
    """Return labels that keep the limits of common.proto."""
    if len(labels) > 64:
        raise InvalidArgument(field, f"{len(labels)} labels", "at most 64")
    for key, value in labels.items():
        if not key or len(key) > 128:
            raise InvalidArgument(f"{field}[{key}]", key, "a key of 1 to 128 characters")
        if len(value) > 4096:
            raise InvalidArgument(f"{field}[{key}]", value, "at most 4096 characters")
    return dict(labels)


def check_servers(servers: Sequence[str], field: str, *, domains: bool = False) -> tuple[str, ...]:
    """Return name servers, "ADDRESS[:PORT]", with `domains` also "DOMAIN=ADDRESS[:PORT]"."""
    accepted = f"an address such as 10.0.0.53 or [fd00::53]:5353{', or corp.example=10.0.0.53' if domains else ''}"
    if len(servers) > 16:
        raise InvalidArgument(field, f"{len(servers)} servers", "at most 16")
    for index, text in enumerate(servers):
        domain, separator, server = text.rpartition("=")
        if (separator and not (domains and _DOMAIN.fullmatch(domain))) or not _is_server(server):
            raise InvalidArgument(f"{field}[{index}]", text, accepted)
    return tuple(servers)


def _is_server(text: str) -> bool:
    match = _SERVER.fullmatch(text)
    if match is None or not 0 < int(match["port"] or match["port4"] or 53) < 65536:
        return False
    try:
        ip_address(match["bracketed"] or match["v4"] or match["bare"])
    except ValueError:
        return False
    return True


def check_request_id(value: str, *, field: str = "request_id") -> str:
    """Return a request id that is empty or a UUID (RFC 9562)."""
    if value and not _REQUEST_ID.fullmatch(value):
        raise InvalidArgument(field, value, "a UUID, or nothing")
    return value


def check_period(field: str, period: Duration) -> float:
    """Return a duration's seconds.

    Raises:
        InvalidArgument: it is below zero, or above ten years.
    """
    seconds = period.ToNanoseconds() / 1e9
    if not 0 <= seconds <= _LONGEST_PERIOD:
        raise InvalidArgument(field, f"{seconds:g} s", "0 to ten years")
    return seconds


def check_mask(mask: FieldMask, *, mutable: Sequence[str], immutable: Sequence[str]) -> set[str]:
    """Return the paths of an update mask.

    Raises:
        InvalidArgument: it is empty, or names a field that does not exist.
        Immutable: it names a field that cannot change.
    """
    accepted = f"fields of: {', '.join(mutable)}"
    if not mask.paths:
        raise InvalidArgument("update_mask", "", accepted)
    for path in mask.paths:
        if path not in mutable:
            if path.split(".")[0] in immutable or path in immutable:
                raise Immutable(path, ", ".join(mutable))
            raise InvalidArgument("update_mask", path, accepted)
    return set(mask.paths)


class Filters:
    """Parsed `filter` terms: different keys must all hold; of one key one value must, but every label must."""

    def __init__(self, terms: Sequence[str], accepted: Sequence[str]) -> None:
        self.values: dict[str, list[str]] = {}
        for term in terms:
            key, separator, value = term.partition("=")
            if not separator or key not in accepted:
                raise InvalidArgument(
                    "filter", term, f"key=value with a key of: {', '.join(accepted)}", reason="UNKNOWN_FILTER"
                )
            self.values.setdefault(key, []).append(value)

    def any(self, key: str, matches: Callable[[str], bool]) -> bool:
        """Say whether one of the key's values matches, or none was asked for."""
        return key not in self.values or any(matches(value) for value in self.values[key])

    def labels(self, labels: Mapping[str, str]) -> bool:
        """Say whether every `label` matches and no `label!` does."""
        return all(label_matches(labels, wanted) for wanted in self.values.get("label", [])) and not any(
            label_matches(labels, unwanted) for unwanted in self.values.get("label!", [])
        )

    def where(self) -> tuple[str, list[str]]:
        """Return what `id`, `name` and `label` ask for as an SQL condition of a table, with its values."""
        conditions, values = list[str](), list[str]()
        for key, condition in (("id", _ID_BEGINS), ("name", _NAME_HAS)):
            wanted = self.values.get(key, [])
            if wanted:
                conditions.append(f"({' OR '.join([condition] * len(wanted))})")
                values += [text for each in wanted for text in _sql_values(key, each)]
        for label in self.values.get("label", []):
            key, separator, value = label.partition("=")
            conditions.append(_LABEL_IS if separator else _LABEL)
            values += [key, value] if separator else [key]
        return " AND ".join(conditions) or "1", values

    def refuse_unknown(self, key: str, accepted: Iterable[str]) -> None:
        """Refuse values of a key that nothing can have."""
        for value in self.values.get(key, []):
            if value not in accepted:
                raise InvalidArgument("filter", f"{key}={value}", f"a {key} of: {', '.join(accepted)}")

    def flag(self, key: str) -> bool | None:
        """Return a true/false filter, None when it was not given."""
        values = self.values.get(key, [])
        for value in values:
            if value.lower() not in ("true", "false", "1", "0"):
                raise InvalidArgument("filter", f"{key}={value}", "true or false")
        return values[-1].lower() in ("true", "1") if values else None


@contextmanager
def missing_allowed(*, allow: bool) -> Iterator[None]:
    """Make NotFound a success where the caller said so (`allow_missing`)."""
    try:
        yield
    except NotFound:
        if not allow:
            raise


def _sql_values(key: str, wanted: str) -> list[str]:
    """Return the values of one condition. A name is looked for between two marks that no name has.

    Of Docker's patterns that is what scripts use: "^" and "$" tie a part of a name to its begin and end.
    """
    if key == "id":
        return [wanted, wanted]
    part = wanted.removeprefix("^").removesuffix("$")
    return [_MARK, _MARK, f"{_MARK * wanted.startswith('^')}{part}{_MARK * wanted.endswith('$')}"]


class _Created(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def create_time(self) -> float: ...


def page(items: Sequence[T], page_size: int, page_token: str, resource: Callable[[T], _Created]) -> tuple[list[T], str]:
    """Return one page of items, oldest resource first, and the token of the next page.

    The token names the last item returned, so that what is created or removed in between neither repeats nor hides
    others.

    Raises:
        InvalidArgument: the size is negative, or the token is not one of ours.
    """
    size, after = page_bounds(page_size, page_token)

    def age(item: T) -> tuple[float, str]:
        return resource(item).create_time, resource(item).id

    rest = sorted((item for item in items if age(item) > after), key=age)
    return rest[:size], next_page(resource(rest[size - 1])) if len(rest) > size else ""


def page_bounds(page_size: int, page_token: str) -> tuple[int, tuple[float, str]]:
    """Return how many items a page has, and the age (time of creation, id) after which it begins.

    Raises:
        InvalidArgument: the size is negative, or the token is not one of ours.
    """
    if page_size < 0:
        raise InvalidArgument("page_size", page_size, f"0 (means {_DEFAULT_PAGE}) to {_MAX_PAGE}")
    return min(page_size or _DEFAULT_PAGE, _MAX_PAGE), _decode(page_token) if page_token else (0.0, "")


def next_page(last: _Created) -> str:
    """Return the token of the page after a resource."""
    return _encode((last.create_time, last.id))


def _encode(age: tuple[float, str]) -> str:
    return base64.urlsafe_b64encode(f"v1:{age[0]!r}:{age[1]}".encode()).decode()


def _decode(token: str) -> tuple[float, str]:
    try:
        version, moment, resource_id = base64.urlsafe_b64decode(token.encode()).decode().split(":")
        if version == "v1":
            return float(moment), resource_id
    except ValueError:
        pass
    raise InvalidArgument("page_token", token, "a next_page_token of the same list")


def timestamp(seconds: float) -> Timestamp | None:
    """Return seconds since the epoch as a Timestamp, None for 0."""
    if not seconds:
        return None
    microseconds = round(seconds * 1e6)
    return Timestamp(seconds=microseconds // 10**6, nanos=microseconds % 10**6 * 1000)


def duration(seconds: float) -> Duration:
    """Return seconds as a Duration."""
    found = Duration()
    found.FromNanoseconds(round(seconds * 1e9))
    return found
