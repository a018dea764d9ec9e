"""Upstreams: which server is asked when, against servers on 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from dnslib import QTYPE, RCODE, RR, A, DNSRecord

from netstore.resolver import upstream
from netstore.resolver.upstream import Upstreams

QUESTION = bytes(DNSRecord.question("www.example.org").pack())
Reply = Callable[[bytes], Awaitable[bytes | None]]


class Server(asyncio.DatagramProtocol):
    """A name server; counts what it is asked."""

    def __init__(self, reply: Reply) -> None:
        self.reply, self.asked, self.tasks = reply, 0, set[asyncio.Task[None]]()

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport
        self.address = "127.0.0.1:{}".format(transport.get_extra_info("sockname")[1])

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.asked += 1

        async def answer() -> None:
            made = await self.reply(data)
            if made:
                self.transport.sendto(made, addr)

        self.tasks.add(asyncio.get_running_loop().create_task(answer()))


@contextlib.asynccontextmanager
async def serving(*replies: Reply) -> AsyncIterator[list[Server]]:
    made = []
    for reply in replies:
        _, server = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda reply=reply: Server(reply), local_addr=("127.0.0.1", 0)
        )
        made.append(server)
    try:
        yield made
    finally:
        for server in made:
            server.transport.close()


def saying(address: str, code: int = 0) -> Reply:
    async def reply(data: bytes) -> bytes:
        answer = DNSRecord.parse(data).reply()
        answer.header.rcode = code
        if not code:
            answer.add_answer(RR("www.example.org", QTYPE.A, rdata=A(address)))
        return bytes(answer.pack())

    return reply


async def silent(data: bytes) -> None:
    return None


def first(answer: bytes | None) -> str:
    assert answer
    assert answer[:2] == QUESTION[:2]
    return str(DNSRecord.parse(answer).rr[0].rdata)


async def test_order_and_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_ATTEMPT_SECONDS", 0.3)
    monkeypatch.setattr(upstream, "_AVOID_SECONDS", 1)
    async with serving(silent, saying("", RCODE.SERVFAIL), saying("10.0.0.3")) as servers:
        upstreams = Upstreams([server.address for server in servers], Path("/nonexistent"))
        assert first(await upstreams.ask(QUESTION, tcp=False)) == "10.0.0.3"
        assert [server.asked for server in servers] == [1, 1, 1]
        assert first(await upstreams.ask(QUESTION, tcp=False)) == "10.0.0.3"  # the silent one is skipped
        assert servers[0].asked == 1
        servers[0].reply = saying("10.0.0.1")
        await asyncio.sleep(1)
        assert first(await upstreams.ask(QUESTION, tcp=False)) == "10.0.0.1"  # and tried again later
        servers[0].reply = saying("", RCODE.NXDOMAIN)
        answer = await upstreams.ask(QUESTION, tcp=False)
        assert answer
        assert answer[3] & 0xF == RCODE.NXDOMAIN  # an answer as good as any
        for server in servers:
            server.reply = saying("", RCODE.SERVFAIL)
        answer = await upstreams.ask(QUESTION, tcp=False)
        assert answer
        assert answer[3] & 0xF == RCODE.SERVFAIL


async def test_a_lost_question_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_REPEAT_SECONDS", 0.3)
    async with serving(silent) as (server,):
        upstreams = Upstreams([server.address], Path("/nonexistent"))
        asking = asyncio.create_task(upstreams.ask(QUESTION, tcp=False))
        await asyncio.sleep(0.05)
        server.reply = saying("10.0.0.1")
        assert first(await asking) == "10.0.0.1"


async def test_one_question_of_many_goes_out_once_and_a_loop_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_ATTEMPT_SECONDS", 0.5)

    async def slow(data: bytes) -> bytes | None:
        await asyncio.sleep(0.1)
        return await saying("10.0.0.1")(data)

    async with serving(slow) as (server,):
        upstreams = Upstreams([server.address], Path("/nonexistent"))
        questions = [number.to_bytes(2, "big") + QUESTION[2:] for number in range(300)]
        answers = await asyncio.gather(*(upstreams.ask(each, tcp=False) for each in questions))
        assert [answer[:2] for answer in answers if answer] == [each[:2] for each in questions]
        assert server.asked == 1
        server.reply = lambda data: upstreams.ask(data, tcp=False)  # sends what it is asked back to us
        async with asyncio.timeout(10):
            assert await upstreams.ask(QUESTION, tcp=False) is None
        assert server.asked <= 3


async def test_resolv_conf_is_watched(tmp_path: Path) -> None:
    """Written, replaced, a link turned elsewhere, removed and made again: known without looking."""
    (tmp_path / "run").mkdir()
    real, link = tmp_path / "run/real", tmp_path / "resolv.conf"
    real.write_text("# mine\nnameserver 10.0.0.1\nnameserver nonsense\n")
    link.symlink_to("run/real")
    with contextlib.ExitStack() as stack:
        upstreams = Upstreams([], link)
        upstreams.start(stack)

        async def becomes(*servers: str) -> None:
            async with asyncio.timeout(3):
                while upstreams.servers() != [(server, 53) for server in servers]:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

        await becomes("10.0.0.1")
        real.write_text("nameserver 10.0.0.2\nnameserver fd00::2\n")
        await becomes("10.0.0.2", "fd00::2")
        (tmp_path / "new").write_text("nameserver 10.0.0.3\n")
        (tmp_path / "new").rename(real)
        await becomes("10.0.0.3")
        (tmp_path / "other").write_text("nameserver 10.0.0.4\n")
        (tmp_path / "swap").symlink_to("other")
        (tmp_path / "swap").rename(link)
        await becomes("10.0.0.4")
        link.unlink()
        await becomes()
        link.write_text("nameserver 10.0.0.5\n" * 5)
        await becomes("10.0.0.5", "10.0.0.5", "10.0.0.5")
