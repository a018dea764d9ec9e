"""A further process in a running container (docker exec): started by the runtime, its streams ours."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from netstore.launcher.runtime import Runtime, failure

__all__ = ["Execution"]

_CHUNK = 1 << 15


class Execution:
    """One exec. `run` yields ("stdout" or "stderr", bytes) and in the end sets `exit_code`."""

    def __init__(self, runtime: Runtime, container_id: str, directory: Path, document: dict[str, Any]) -> None:
        self._runtime = runtime
        self._container_id = container_id
        self._directory = directory
        self._document = document
        self.exit_code = 125

    async def run(self, stdin: AsyncIterator[bytes] | None) -> AsyncIterator[tuple[str, bytes]]:
        """Run to the end; what comes from `stdin` is the process's input, None is an empty one."""
        with tempfile.TemporaryDirectory(prefix="exec-", dir=self._directory) as place:
            process_file, pid_file = Path(place, "process.json"), Path(place, "pid")
            await asyncio.to_thread(process_file.write_bytes, msgspec.json.encode(self._document))
            process = await asyncio.create_subprocess_exec(
                *self._runtime.exec(self._container_id, process_file, pid_file),
                stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            feeding = asyncio.ensure_future(_feed(process, stdin)) if stdin else None
            errors = b""
            try:
                async for stream, data in _merged(process):
                    errors = (errors + data)[-4096:] if stream == "stderr" else errors
                    yield stream, data
                self.exit_code = await process.wait()
                if not pid_file.exists():  # noqa: ASYNC240 (the runtime never started the command)
                    self.exit_code = failure(errors.decode(errors="replace")) or self.exit_code
            finally:
                if feeding:
                    feeding.cancel()
                if process.returncode is None:
                    process.kill()
                    await process.wait()


async def _feed(process: asyncio.subprocess.Process, stdin: AsyncIterator[bytes]) -> None:
    assert process.stdin is not None
    try:
        async for data in stdin:
            process.stdin.write(data)
            await process.stdin.drain()
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        process.stdin.close()


async def _merged(process: asyncio.subprocess.Process) -> AsyncIterator[tuple[str, bytes]]:
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
