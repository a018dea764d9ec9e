"""How results are shown: tables, one stable JSON shape, and fields picked by `{{.Name}}`.

JSON is protobuf's own mapping with the contract's field names and every field present, one object a resource.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import click

__all__ = [
    "age",
    "by_name",
    "duration",
    "listing",
    "name_of",
    "one_line",
    "pairs",
    "shapes",
    "short_id",
    "show_objects",
    "size",
    "to_dict",
]

T = TypeVar("T", bound=Any)
_FIELD = re.compile(r"\{\{\s*(json\s+)?\.([A-Za-z_][\w.]*)?\s*\}\}")
_LABEL = re.compile(r"\{\{\s*\.Label\s+\"([^\"]*)\"\s*\}\}")
_DIGITS = re.compile(r"(\d+)")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_DOCKERS = {"ID": "id", "CreatedAt": "create_time", "IPv6": "enable_ipv6"}
"""Fields of Docker's templates that have other names here."""
_SINCE = ("CreatedSince", "RunningFor")
"""What Docker calls the column CREATED in templates, of images and of containers."""


def to_dict(message: Any) -> dict[str, Any]:
    """Return the JSON mapping of a message."""
    from google.protobuf.json_format import MessageToDict

    found = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return {key: _ordered(getattr(message, key, None), value) for key, value in found.items()}


def _ordered(field: Any, value: Any) -> Any:
    """Give maps, such as labels, one order: protobuf's differs from run to run."""
    if not isinstance(value, dict):
        return value
    if not hasattr(field, "DESCRIPTOR"):
        return dict(sorted(value.items()))
    return {key: _ordered(getattr(field, key, None), each) for key, each in value.items()}


def by_name(found: Iterable[T]) -> list[T]:
    """Return resources in the order of their names, as Docker does: net2 before net10."""
    return sorted(
        found, key=lambda each: [part.zfill(20) if part.isdigit() else part for part in _DIGITS.split(each.name)]
    )


def shapes(command: Any) -> Any:
    """Add --format, -q and --no-trunc to a list command."""
    command = click.option("--no-trunc", is_flag=True, help="Show ids in full.")(command)
    command = click.option("-q", "--quiet", is_flag=True, help="Show ids only.")(command)
    return click.option(
        "--format", "template", help="'json', or a template: '{{.Name}} {{json .Labels}}', with columns: 'table …'."
    )(command)


def listing(
    messages: Sequence[Any], headers: Sequence[str], rows: Sequence[Sequence[str]], template: str | None, *,
    quiet: bool, ids: Sequence[str],
) -> None:  # fmt: skip
    """Show a list: ids with `quiet`, else as the template says, else a table. A template picks columns, too, by what
    Docker calls them: {{.Names}}, {{.ID}}; "table {{.Names}}\\t{{.Image}}" puts their titles above.
    """
    if quiet:
        if ids:
            click.echo("\n".join(ids))
        return
    if not template or template == "table":
        _table(headers, rows)
        return
    titles = {name: header for header in headers for name in _column(header)}
    columns = [{name: row[headers.index(title)] for name, title in titles.items()} for row in rows]
    if template.startswith("table "):
        template = template.removeprefix("table ").replace("\\t", "\t")
        lines = [line.split("\t") for line in _lines(messages, template, columns)]
        above = _FIELD.sub(lambda match: titles.get(match[2] or "", (match[2] or "").upper()), template)
        _table(_LABEL.sub(lambda match: match[1].upper(), above).split("\t"), lines)
    else:
        show_objects(messages, template, columns=columns)


def _column(header: str) -> tuple[str, ...]:
    """Return what Docker's templates call a column: ID for CONTAINER ID, Name for VOLUME NAME."""
    word = header.rpartition(" ")[2]
    return _SINCE if word == "CREATED" else (word if word == "ID" else word.capitalize(),)


def show_objects(
    messages: Sequence[Any], template: str, *, more: Callable[[Any], dict[str, Any]] | None = None,
    columns: Sequence[Mapping[str, str]] = (),
) -> None:  # fmt: skip
    """Show each message by a template, or all as a JSON array for `json`; with the further fields that `more` gives.

    `columns` are what templates can pick besides, of each.
    """
    if template == "json":
        click.echo(json.dumps([_document(message, more) for message in messages], indent=2))
        return
    for line in _lines(messages, template, columns, more):
        click.echo(line)


def _document(message: Any, more: Callable[[Any], dict[str, Any]] | None) -> dict[str, Any]:
    return to_dict(message) | (more(message) if more else {})


def _lines(
    messages: Sequence[Any], template: str, columns: Sequence[Mapping[str, str]],
    more: Callable[[Any], dict[str, Any]] | None = None,
) -> Iterator[str]:  # fmt: skip
    """Yield what a template makes of each message."""
    left, fields = _FIELD.subn("", template)
    left, labels = _LABEL.subn("", left)
    if not fields + labels:
        raise click.UsageError(f"--format: {template!r} is neither json nor a template with {{{{.Field}}}}")
    if "{{" in left:
        known = '{{.Field}}, {{json .Field}} and {{.Label "key"}}'
        raise click.UsageError(f"--format: {left[left.index('{{') :]!r} is not known: there are {known}")
    for message, column in zip(messages, columns or [{}] * len(messages), strict=True):
        document = _document(message, more)
        pick = partial(_pick, document, _worded(message, document), column)
        parts = _LABEL.split(template.replace("\\t", "\t"))  # text, then in turn a key and text
        own = document.get("labels") or {}
        yield "".join(own.get(part, "") if i % 2 else _FIELD.sub(pick, part) for i, part in enumerate(parts))


def _worded(message: Any, document: dict[str, Any]) -> dict[str, Any]:
    """Return a document whose enums are words, as in Docker's templates: running, for CONTAINER_STATE_RUNNING."""
    worded = dict(document)
    for field in message.DESCRIPTOR.fields:
        value = document.get(field.name)
        if field.enum_type:
            prefix = f"{_CAMEL.sub('_', field.enum_type.name).upper()}_"
            several = [value] if isinstance(value, str) else value or []
            words = [each.removeprefix(prefix).lower() for each in several]
            worded[field.name] = words[0] if isinstance(value, str) else words
        elif isinstance(value, dict) and hasattr(inner := getattr(message, field.name), "DESCRIPTOR"):
            worded[field.name] = _worded(inner, value)
    return worded


def _pick(plain: dict[str, Any], worded: dict[str, Any], column: Mapping[str, str], match: re.Match[str]) -> str:
    if not match[1] and match[2] in column:
        return column[match[2]]
    value: Any
    document = value = plain if match[1] else worded
    for part in (match[2] or "").split("."):
        if not part:
            continue
        name = _CAMEL.sub("_", part).lower()
        name = _DOCKERS.get(part, name)
        if value is document:  # Docker's templates know no spec and no status: {{.Driver}}, {{.Mountpoint}}
            inner = (document, document.get("spec") or {}, document.get("status") or {})
            value = next((each for each in inner if name in each or part in each), document)
        if not isinstance(value, dict) or (name not in value and part not in value):
            known = ", ".join(value) if isinstance(value, dict) else "none"
            raise click.UsageError(f"--format: no field {part!r}; there are: {known}")
        value = value[part] if part in value else value[name]
    if match[1] or isinstance(value, (dict, list)):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns three spaces apart, as Docker does: for eyes, and for awk."""
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]
    lines = ("   ".join(map(str.ljust, row, widths)).rstrip() for row in (headers, *rows))
    click.echo("\n".join(lines))  # once: it flushes each time


def short_id(text: str, *, full: bool) -> str:
    """Return an id, or its first 12 digits."""
    return text if full else text[:12]


def one_line(items: Sequence[str], width: int, *, full: bool) -> str:
    """Return a command line, shortened to a width."""
    text = " ".join(items)
    return text if full or len(text) <= width else f"{text[: width - 1]}…"


def name_of(enum: Any, value: int, prefix: str) -> str:
    """Return an enum value's name in lower case, without the enum's own."""
    return str(enum.Name(value)).removeprefix(f"{prefix}_").lower()


def pairs(mapping: Any) -> str:
    """Return labels as k=v, comma-separated."""
    return ",".join(f"{key}={value}" for key, value in sorted(mapping.items()))


def age(timestamp: Any) -> str:
    """Say how long ago a time was, in Docker's words."""
    return f"{duration(time.time() - timestamp.ToNanoseconds() / 1e9)} ago"


def duration(seconds: float) -> str:
    """Say how long, in Docker's words."""
    for limit, unit, length in ((60, "second", 1), (3600, "minute", 60), (172800, "hour", 3600), (1e12, "day", 86400)):
        if seconds < limit:
            count = max(int(seconds // length), 0)
            if unit == "second" and count < 1:
                return "Less than a second"
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return ""


def size(count: float) -> str:
    """Say how many bytes, in units of 1000 as Docker does."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.4g}{unit}"
        count /= 1000
    return ""
