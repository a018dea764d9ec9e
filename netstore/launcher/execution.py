"""A further process in a running container (docker exec): started by the runtime, its streams ours."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import msgspec

from netstore.launcher.runtime import Runtime, failure
from netstore.launcher.terminals import Input, Size, read_terminal, resize, resize_of

__all__ = ["Execution"]

_CHUNK = 1 << 15


class Execution:
    """One exec. `run` yields ("stdout" or "stderr", bytes) and in the end sets `exit_code`.

    With a terminal the runtime gets one of ours, and copies between it and the one that it makes in the container.
    """

    def __init__(
        self, runtime: Runtime, container_id: str, directory: Path, document: dict[str, Any], terminal: Size | None
    ) -> None:
        self._runtime = runtime
        self._container_id = container_id
        self._directory = directory
        self._document = document
        self._terminal = terminal
        self.exit_code = 125

    async def run(self, given: AsyncIterator[Input] | None) -> AsyncIterator[tuple[str, bytes]]:
        """Run to the end; what is `given` is the process's input (and its terminal's size), None is an empty one."""
        with tempfile.TemporaryDirectory(prefix="exec-", dir=self._directory) as place:
            process_file, pid_file = Path(place, "process.json"), Path(place, "pid")
            await asyncio.to_thread(process_file.write_bytes, msgspec.json.encode(self._document))
            command = self._runtime.exec(self._container_id, process_file, pid_file)
            begin = self._in_terminal if self._terminal else self._in_pipes
            process, output, feeding = await begin(command, given, pid_file)
            last = b""
            try:
                async with aclosing(output):
                    async for stream, data in output:
                        last = (last + data)[-4096:] if stream == "stderr" or self._terminal else last
                        yield stream, data
                self.exit_code = await process.wait()
                if not pid_file.exists():  # noqa: ASYNC240 (the runtime never started the command)
                    self.exit_code = failure(last.decode(errors="replace")) or self.exit_code
            finally:
                if feeding:
                    feeding.cancel()
                if process.returncode is None:
                    process.kill()
                    await process.wait()

    async def detach(self) -> AsyncIterator[tuple[str, bytes]]:
        """Start it, and leave it to itself, whoever else ends. Why it cannot be started is "stderr"."""
        with tempfile.TemporaryDirectory(prefix="exec-", dir=self._directory) as place:
            process_file, log = Path(place, "process.json"), Path(place, "log")
            await asyncio.to_thread(process_file.write_bytes, msgspec.json.encode(self._document))
            # Its streams are those of the runtime, which therefore has none, and says in a file what is wrong.
            process = await asyncio.create_subprocess_exec(
                *self._runtime.exec(self._container_id, process_file, Path(place, "pid"), log=log),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            self.exit_code = await process.wait()
            if self.exit_code:
                said = await asyncio.to_thread(_read_log, log)
                self.exit_code = failure(said) or self.exit_code
                yield "stderr", f"{self._document['args'][0]} cannot be run: {said}\n".encode()

    async def _in_pipes(self, command: list[str], given: AsyncIterator[Input] | None, _: Path) -> _Begun:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE if given else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        feeding = asyncio.ensure_future(_feed(process.stdin, given)) if given and process.stdin else None
        return process, _merged(process), feeding

    async def _in_terminal(self, command: list[str], given: AsyncIterator[Input] | None, pid_file: Path) -> _Begun:
        assert self._terminal is not None
        master, slave = os.openpty()
        try:
            os.set_blocking(master, False)
            resize(master, self._terminal)
            setsid = shutil.which("setsid") or "setsid"
            process = await asyncio.create_subprocess_exec(
                setsid, "--ctty", *command, stdin=slave, stdout=slave, stderr=slave
            )
        except BaseException:
            os.close(master)
            raise
        finally:
            os.close(slave)
        feeding = asyncio.ensure_future(_type(os.dup(master), given, pid_file)) if given else None
        return process, _printed(master), feeding


_Begun = tuple[
    asyncio.subprocess.Process, AsyncGenerator[tuple[str, bytes], None], asyncio.Future[None] | None
]  # fmt: skip


def _read_log(log: Path) -> str:
    return log.read_text(errors="replace").strip() if log.exists() else "the runtime gave no reason"


async def _feed(pipe: asyncio.StreamWriter, given: AsyncIterator[Input]) -> None:
    """Write what is given to a process's input, and then end it."""
    try:
        async for data in given:
            if isinstance(data, bytes):
                pipe.write(data)
                await pipe.drain()
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        pipe.close()


async def _type(terminal: int, given: AsyncIterator[Input], pid_file: Path) -> None:
    """Write what is given to a terminal, and resize it, and that of the process; `terminal` is closed."""
    try:
        async for data in given:
            if isinstance(data, Size):
                resize(terminal, data)
                await asyncio.to_thread(_resize_inside, pid_file, data)
                continue
            while data:
                try:
                    data = data[os.write(terminal, data) :]
                except BlockingIOError:  # it is full: nobody reads
                    await asyncio.sleep(0.01)
    except OSError:
        pass  # the process has ended
    finally:
        os.close(terminal)


def _resize_inside(pid_file: Path, size: Size) -> None:
    with suppress(OSError, ValueError):  # it is not there yet, and will have the size
        resize_of(int(pid_file.read_text()), size)


async def _printed(master: int) -> AsyncGenerator[tuple[str, bytes], None]:
    async with aclosing(read_terminal(master)) as output:
        async for data in output:
            yield "stdout", data


async def _merged(process: asyncio.subprocess.Process) -> AsyncGenerator[tuple[str, bytes], None]:
    """Yield output of both streams as it comes."""
    queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(maxsize=16)

    async def pump(name: str, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(_CHUNK):
            await queue.put((name, data))
        await queue.put((name, b""))

    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.TaskGroup() as group:
        group.create_task(pump("stdout", process.stdout))
        group.create_task(pump("stderr", process.stderr))
        open_streams = 2
        while open_streams:
            name, data = await queue.get()
            if data:
                yield name, data
            else:
                open_streams -= 1
