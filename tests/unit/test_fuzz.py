"""Parsers of what people and the network send: whatever it is, an error that says so, or a value that makes sense."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import click
from dnslib import EDNS0, QTYPE, RCODE, DNSQuestion, DNSRecord
from hypothesis import example, given, settings
from hypothesis import strategies as st

from netstore.api.v1 import common_pb2, mount_pb2
from netstore.cli import grammar, mounts
from netstore.errors import InvalidArgument
from netstore.model import MountType
from netstore.resolver.answers import Answers, Forward
from netstore.resolver.names import Service, View
from netstore.resolver.wire import refusal
from netstore.rpc.endpoints import to_port
from netstore.rpc.mounts import to_mount, to_mount_message

PORTISH = st.text(alphabet="0123456789:-/[].,=tcpudsfromhiablegx", max_size=40)


@given(PORTISH)
@example("8000-8001:80")
@example("[::1]:80:80/sctp")
@settings(max_examples=500)
def test_ports(text: str) -> None:
    try:
        found = grammar.parse_port(text)
    except click.UsageError as error:
        assert "-p" in str(error)
        return
    for port in found:
        assert isinstance(port, common_pb2.PortMapping)
        try:
            translated = to_port(port, "ports[0]")
        except InvalidArgument as error:
            assert error.field.startswith("ports[0]")
            continue
        assert 1 <= translated.container_port <= translated.container_port + translated.count - 1 <= 65535
        assert 0 <= translated.host_port + translated.count - 1 <= 65535


@given(st.text(alphabet="name=alisp6,mc-rdto0123.:\"' ", max_size=60))
@settings(max_examples=500)
def test_networks(text: str) -> None:
    try:
        assert grammar.parse_network(text).network or not text
    except click.UsageError as error:
        assert "--network" in str(error)


def check_mount(parse: Callable[[str], mount_pb2.MountSpec], text: str, flag: str) -> mount_pb2.MountSpec | None:
    """Parse, then translate as the server does; whatever is refused, the error says which flag or field."""
    try:
        mount = parse(text)
    except click.UsageError as error:
        assert str(error).startswith(flag), text
        return None
    try:
        translated = to_mount(mount, "mounts[0]")
    except InvalidArgument as error:
        assert error.field.startswith("mounts[0]."), text
        return None
    assert translated.target.startswith("/")
    assert translated.target.strip("/")
    assert ".." not in (*translated.target.split("/"), *translated.subpath.split("/"))
    assert translated.source.startswith("/") == (translated.type is MountType.BIND)
    assert to_mount(to_mount_message(translated), "m") == translated  # what is shown is what was asked
    return mount


OPTIONS = st.lists(
    st.sampled_from(
        ["ro", "rw", "z", "Z", "nocopy", "rslave", "shared", "rprivate", "noexec", "nosuid", "dev", "U", "cached", "x", "",
         "idmap=uids=0-1-2", "idmap=uids=0-1-2#5-6-7;gids=1-2-3", "idmap=uids=0-1", "idmap=x"]
    ), max_size=4,
)  # fmt: skip
PATHS = st.one_of(
    st.text(alphabet="/.ab:~-_", max_size=12),
    st.sampled_from(["data", "/srv", "./here", "~/x", "/", "/a/../b", "..", "/v", "/v/w/"]),
)


@given(PATHS, PATHS, OPTIONS)
@example("", "/t", [])
@settings(max_examples=1000)
def test_volumes(source: str, target: str, options: list[str]) -> None:
    text = ":".join(part for part in (source, target, ",".join(options)) if part)
    mount = check_mount(mounts.parse_volume, text, "-v")
    if mount is not None and source and target and options and ":" not in source + target:
        assert mount.read_only == ("ro" in options)
        assert mount.no_exec == ("noexec" in options)


@given(st.text(alphabet=':/,.=rwoxseizmdu0123456789kg"', max_size=40))
@settings(max_examples=500)
def test_noise(text: str) -> None:
    for parse, flag in ((mounts.parse_volume, "-v"), (mounts.parse_tmpfs, "--tmpfs"), (mounts.parse_mount, "--mount")):
        check_mount(parse, text, flag)


KEYS = ["type", "source", "src", "target", "dst", "destination", "readonly", "ro", "bind-propagation", "bind-recursive",
        "bind-create-src", "bind-nonrecursive", "volume-subpath", "volume-nocopy", "volume-label", "volume-driver",
        "volume-opt", "image-subpath", "tmpfs-size", "tmpfs-mode", "consistency", "noexec", "idmap", "chown", "colour",
        " ro", "RO"]  # fmt: skip
VALUES = ["", "volume", "bind", "tmpfs", "image", "/a", "a", "./a", "../a", "/", "true", "0", "maybe", "rslave", "readonly",
          "disabled", "k=v", "=v", "64m", "-1", "1777", "99999", "9", "uids=0-1-2", "a b", "a\0b", "q\""]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from([None, *VALUES])), max_size=6), st.booleans())
@example([("type", "bind"), ("source", "/a"), ("target", "/b"), ("ro", None), ("bind-recursive", "readonly")], False)
@settings(max_examples=1500)
def test_mounts(pairs: list[tuple[str, str | None]], quoted: bool) -> None:
    parts = [key if value is None else f"{key}={value}" for key, value in pairs]
    if quoted:
        parts = ['"' + part.replace('"', '""') + '"' for part in parts]
    check_mount(mounts.parse_mount, ",".join(parts), "--mount")


class Known:
    """Names of a sandbox that knows `web`."""

    def version(self) -> int:
        return 1

    def view(self, sandbox_id: str) -> View:
        return View({"n": "app"}, (), sandbox_id == "s", ("corp.example=10.0.0.53", "10.0.0.54"), ("10.0.0.0/24",))

    def addresses(self, view: View, name: str) -> list[str] | None:
        return ["10.0.0.2", "fd00::2"] if name == "web" else None

    def services(self, view: View, service: str, protocol: str, name: str) -> list[Service] | None:
        return [Service(80, "web.app", ("10.0.0.2",))] if name == "web" else None

    def name_of(self, view: View, packed: bytes) -> str:
        return "web.app" if packed == bytes([10, 0, 0, 2]) else ""


WEB = bytes(DNSRecord.question("web").pack())
QUESTIONS = [
    WEB,
    bytes(DNSRecord.question("_http._tcp.web", "SRV").pack()),
    bytes(DNSRecord.question("2.0.0.10.in-addr.arpa", "PTR").pack()),
    bytes(DNSRecord(q=DNSQuestion("WeB"), ar=[EDNS0(udp_len=1232)]).pack()),
]
# Pointers, each to the one before: a parser that follows them recurses as often as there are.
LOOPS = [WEB[:12] + b"\xc0\x0c" + bytes(4), WEB + b"".join((0xC00C + 2 * n).to_bytes(2, "big") for n in range(8000))]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good question, shortened, with some bytes changed, and with others behind it."""
    data = bytearray(draw(st.sampled_from(QUESTIONS)))
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))]) + draw(st.binary(max_size=40))


@given(st.one_of(st.binary(max_size=600), damaged()), st.booleans(), st.sampled_from("si"))
@example(WEB, False, "s")
@example(b"", True, "s")
@example(LOOPS[0], True, "s")
@example(LOOPS[1], False, "i")
@settings(max_examples=2000)
def test_questions(data: bytes, tcp: bool, sandbox: str) -> None:
    started = time.thread_time()
    try:
        answer = Answers(Known()).answer(sandbox, data, tcp=tcp)  # type: ignore[arg-type]
    except Forward as forward:
        assert sandbox == "s" or forward.servers
        answer = refusal(data, 2)
    assert time.thread_time() - started < 2.0
    if answer is None:
        assert len(data) < 12 or data[2] & 0x80
        return
    assert answer[:2] == data[:2]
    assert answer[2] & 0x80
    if max(data) > 127:  # dnslib reads only names in ASCII
        return
    parsed = DNSRecord.parse(answer)  # whoever asked can read it
    badvers = any(each.rtype == 41 and each.ttl >> 24 for each in parsed.ar)  # the rest of the code (RFC 6891)
    if parsed.header.rcode == 0 and not badvers and not parsed.header.tc:
        assert parsed.rr or parsed.auth  # records, or the SOA that says that there are none


def ask(data: bytes, *, sandbox: str = "s", tcp: bool = False) -> DNSRecord:
    answer = Answers(Known()).answer(sandbox, bytes(data), tcp=tcp)  # type: ignore[arg-type]
    assert answer
    return DNSRecord.parse(answer)


def test_answers_of_each_kind() -> None:
    mixed = ask(QUESTIONS[3])
    assert str(mixed.rr[0].rname) == "WeB."  # the case of the question comes back
    assert [str(each.rdata) for each in mixed.rr] == ["10.0.0.2"]
    assert mixed.ar[0].rtype == QTYPE.OPT
    service = ask(QUESTIONS[1])
    assert str(service.rr[0].rdata) == "0 0 80 web.app."
    assert str(service.ar[0].rdata) == "10.0.0.2"
    assert str(ask(QUESTIONS[2]).rr[0].rdata) == "web.app."
    for kind in ("MX", "TXT"):
        nothing = ask(DNSRecord.question("web", kind).pack())
        assert (nothing.header.rcode, nothing.rr, nothing.auth[0].rtype) == (0, [], QTYPE.SOA)
    # Nobody has that address of our own network, and behind internal networks nobody else can be asked.
    for data, sandbox in ((DNSRecord.question("9.0.0.10.in-addr.arpa", "PTR").pack(), "s"),):
        assert ask(data, sandbox=sandbox).header.rcode == RCODE.NXDOMAIN


def test_every_address_leads_as_often() -> None:
    class Many(Known):
        def addresses(self, view: View, name: str) -> list[str] | None:
            return [f"10.0.0.{n}" for n in range(1, 7)]

    answers = Answers(Many())  # type: ignore[arg-type]
    leads = Counter(str(DNSRecord.parse(answers.answer("s", WEB, tcp=False)).rr[0].rdata) for _ in range(600))
    assert len(leads) == 6
    assert min(leads.values()) > 50


def test_what_is_no_question_of_ours() -> None:
    assert ask(WEB[:4] + b"\0\2" + WEB[6:]).header.rcode == RCODE.FORMERR  # two questions
    assert ask(WEB[:2] + b"\x28" + WEB[3:]).header.rcode == RCODE.NOTIMP  # UPDATE
    assert ask(DNSRecord(q=DNSQuestion("version.bind", QTYPE.TXT, 3)).pack()).header.rcode == RCODE.REFUSED
    version = bytearray(QUESTIONS[3])
    version[-5] = 1
    assert ask(bytes(version)).ar[0].ttl >> 24 == 1  # BADVERS
