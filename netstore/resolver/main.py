"""netstore-resolver: answers DNS inside every sandbox, on sockets that netstored opened there; and carries
TCP from the host's [::1] to published ports (`relay`).

A process of its own, without privileges: names go on resolving while netstored is stopped, killed or upgraded.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import grp
import os
import pwd
import resource
import signal
import socket
import sys
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import click
import structlog

from netstore import __version__, logs, systemd
from netstore.networks.handover import RELAY, Channel
from netstore.resolver.answers import Answers, Forward
from netstore.resolver.names import Names
from netstore.resolver.relay import Relay
from netstore.resolver.upstream import Upstreams
from netstore.resolver.wire import REFUSED, SERVFAIL, refusal

__all__ = ["Resolver", "main"]

_BURST = 64
_TCP_SECONDS = 10.0
_MAX_OF_ONE = 256
"""Questions to upstreams, and TCP connections, of one sandbox at a time."""

log = structlog.get_logger(__name__)


class Resolver:
    """Serves the sockets of every sandbox that netstored hands over."""

    def __init__(self, names: Names, upstreams: Upstreams, relay: Relay) -> None:
        self._answers = Answers(names)
        self._relay = relay
        self._upstreams = upstreams
        self._sockets: dict[str, tuple[socket.socket, ...]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._underway: Counter[str] = Counter()
        self.ending = asyncio.Event()
        """Set when netstored, of another version, asks for the place."""

    async def accept(self, listener: socket.socket) -> None:
        """Take connections of netstored, one after the other."""
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            self._spawn(self._session(connection))

    async def _session(self, connection: socket.socket) -> None:
        self._answers.forget()  # a netstored that is new may have another database
        with Channel(connection) as channel:
            for sandbox_id, held in self._sockets.items():
                channel.post({"held": sandbox_id}, held)
            channel.post({"held": "", "version": __version__})
            while True:
                message, sockets = await channel.receive()
                if message.get("add") == RELAY:
                    self._sockets[RELAY] = sockets
                    self._relay.serve(*sockets)
                elif "add" in message and sockets:
                    self.add(message["add"], *sockets)
                elif "remove" in message:
                    self.remove(message["remove"])
                elif "end" in message:
                    self.ending.set()

    def add(self, sandbox_id: str, udp: socket.socket, tcp: socket.socket) -> None:
        """Serve a sandbox."""
        self.remove(sandbox_id)
        loop = asyncio.get_running_loop()
        for each in (udp, tcp):
            each.setblocking(False)
        self._sockets[sandbox_id] = (udp, tcp)
        loop.add_reader(udp, self._datagrams, sandbox_id, udp)
        loop.add_reader(tcp, self._connections, sandbox_id, tcp)

    def remove(self, sandbox_id: str) -> None:
        """Serve a sandbox no longer."""
        for each in self._sockets.pop(sandbox_id, ()):
            asyncio.get_running_loop().remove_reader(each)
            each.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, OSError):
            log.error("a question failed", error=repr(error))

    def _datagrams(self, sandbox_id: str, udp: socket.socket) -> None:
        for _ in range(_BURST):
            try:
                question, client = udp.recvfrom(4096)
            except OSError:
                return
            try:
                answer = self._answer(sandbox_id, question, tcp=False)
            except Forward as forward:
                if self._underway[sandbox_id] < _MAX_OF_ONE:
                    work = self._forward_datagram(udp, question, client, forward.servers)
                    self._spawn(self._counted(sandbox_id, work))
                    continue
                answer = refusal(question, REFUSED)  # as Docker, where somebody asks too much at once
            if answer:
                with contextlib.suppress(OSError):
                    udp.sendto(answer, client)

    async def _counted(self, sandbox_id: str, work: Coroutine[Any, Any, None]) -> None:
        """Do work of a sandbox's: one that has a lot of it underway gets no more, and leaves the others theirs."""
        self._underway[sandbox_id] += 1
        try:
            await work
        finally:
            self._underway[sandbox_id] -= 1
            if not self._underway[sandbox_id]:
                del self._underway[sandbox_id]

    def _answer(self, sandbox_id: str, question: bytes, *, tcp: bool) -> bytes | None:
        try:
            return self._answers.answer(sandbox_id, question, tcp=tcp)
        except Forward:
            raise
        except Exception as error:
            log.error("a question failed", error=repr(error))
            return refusal(question, SERVFAIL)

    async def _forward_datagram(
        self, udp: socket.socket, question: bytes, client: tuple[str, int], servers: list[str]
    ) -> None:
        answer = await self._forward(question, servers, tcp=False)
        if answer:
            with contextlib.suppress(OSError):
                udp.sendto(answer, client)

    async def _forward(self, question: bytes, servers: list[str], *, tcp: bool) -> bytes | None:
        return await self._upstreams.ask(question, servers, tcp=tcp) or refusal(question, SERVFAIL)

    def _connections(self, sandbox_id: str, tcp: socket.socket) -> None:
        try:
            connection, _ = tcp.accept()
        except OSError:
            return
        if self._underway[sandbox_id] < _MAX_OF_ONE:
            self._spawn(self._counted(sandbox_id, self._converse(sandbox_id, connection)))
        else:
            connection.close()

    async def _converse(self, sandbox_id: str, connection: socket.socket) -> None:
        """Answer questions of one TCP connection (RFC 7766)."""
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            while True:
                async with asyncio.timeout(_TCP_SECONDS):
                    question = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
                try:
                    answer = self._answer(sandbox_id, question, tcp=True)
                except Forward as forward:
                    answer = await self._forward(question, forward.servers, tcp=True)
                if answer is None:
                    return
                writer.write(len(answer).to_bytes(2, "big") + answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, TimeoutError, ConnectionError):
            return
        finally:
            writer.close()


def _listen(run_dir: Path) -> socket.socket:
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
    path = run_dir / "resolver.sock"
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(8)
    listener.setblocking(False)
    return listener


def _drop_privileges(user: str, group: str) -> None:
    """Become `user`, keeping only the group that may read the database: netstored's own, root's where there is none."""
    if os.getuid() != 0:
        return
    entry = pwd.getpwnam(user)
    try:
        os.setgroups([grp.getgrnam(group).gr_gid])
    except KeyError:
        os.setgroups([0])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


async def _serve(listener: socket.socket, database: Path, upstreams: Upstreams) -> None:
    names = Names(database)
    names.open()
    with contextlib.ExitStack() as stack:
        upstreams.start(stack)
        resolver = Resolver(names, upstreams, Relay(database))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, resolver.ending.set)
        accepting = asyncio.create_task(resolver.accept(listener))
        log.info("netstore-resolver is ready", version=__version__, user=os.getuid())
        systemd.notify("READY=1")
        systemd.keep_alive()
        await resolver.ending.wait()
        accepting.cancel()


@click.command()
@click.option("--state-dir", type=click.Path(path_type=Path), default="/var/lib/netstore", show_default=True)
@click.option("--run-dir", type=click.Path(path_type=Path), default="/run/netstore", show_default=True)
@click.option("--user", default="nobody", show_default=True, help="Who to be once the socket is bound.")
@click.option("--group", default="netstore", show_default=True, help="Group that may read netstored's database.")
@click.option("--upstream", multiple=True, help="ADDRESS[:PORT] instead of the host's name servers; repeatable.")
@click.option("--resolv-conf", type=click.Path(path_type=Path), default="/etc/resolv.conf", show_default=True)
@click.option("--log-format", type=click.Choice(["json", "console"]), default="console", show_default=True)
@click.version_option(__version__)
def main(
    state_dir: Path, run_dir: Path, user: str, group: str, upstream: tuple[str, ...], resolv_conf: Path, log_format: str
) -> None:
    """Answer names inside the sandboxes of a node."""
    logs.configure(log_format, "info")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
    with (run_dir / "resolver.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            click.echo(f"netstore-resolver: another one serves {run_dir}\n  hint: stop it first", err=True)
            sys.exit(1)
        try:
            upstreams = Upstreams(list(upstream), resolv_conf)
            listener = _listen(run_dir)
            _drop_privileges(user, group)
        except (OSError, KeyError, ValueError) as error:
            click.echo(f"netstore-resolver: {error}", err=True)
            sys.exit(1)
        asyncio.run(_serve(listener, state_dir / "netstore.db", upstreams))
