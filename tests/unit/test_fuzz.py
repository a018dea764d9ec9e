"""Parsers of what people and the network send: whatever it is, an error that says so, or a value that makes sense."""

from __future__ import annotations

import click
from hypothesis import example, given, settings
from hypothesis import strategies as st

from netstore.api.v1 import common_pb2
from netstore.cli import grammar
from netstore.errors import InvalidArgument
from netstore.resolver.answers import Answers, Forward, refusal
from netstore.resolver.names import View
from netstore.rpc.endpoints import to_port

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


class Nothing:
    """Names of a sandbox that knows `web`."""

    def version(self) -> int:
        return 1

    def view(self, sandbox_id: str) -> View:
        return View({"n": "app"}, (), True, ("corp.example=10.0.0.53", "10.0.0.54"))

    def addresses(self, view: View, name: str) -> list[str] | None:
        return ["10.0.0.2", "fd00::2"] if name == "web" else None

    def name_of(self, view: View, packed: bytes) -> str:
        return "web.app" if packed == bytes([10, 0, 0, 2]) else ""


QUESTION = bytes.fromhex("1234 0100 0001 0000 0000 0000 03 776562 00 0001 0001".replace(" ", ""))


@given(
    st.one_of(st.binary(max_size=600), st.tuples(st.integers(0, len(QUESTION) - 1), st.integers(0, 255))), st.booleans()
)
@example(QUESTION, False)
@example(b"", True)
@settings(max_examples=1000)
def test_questions(data: bytes | tuple[int, int], tcp: bool) -> None:
    if isinstance(data, tuple):  # one byte of a good question changed
        data = QUESTION[: data[0]] + bytes([data[1]]) + QUESTION[data[0] + 1 :]
    answers = Answers(Nothing())  # type: ignore[arg-type]
    try:
        answer = answers.answer("s", data, tcp=tcp)
    except Forward:
        assert isinstance(answers.servers("s", data), list)
        answer = refusal(data, 2)
    if answer is not None:
        assert answer[:2] == data[:2]
        assert answer[2] & 0x80
