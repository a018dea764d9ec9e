"""Registries: skopeo fetches an image into an archive, which is then imported as any other.

Where registries are, which mirrors and certificates they have, and what is trusted is the node's configuration, as for
podman: containers-registries.conf(5), containers-policy.json(5), containers-auth.json(5).
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path

from netstore.errors import Exhausted, FailedPrecondition, NetstoreError, NotFound, Unavailable, Unsupported
from netstore.kernel.tools import leashed

__all__ = ["fetch"]

_UNKNOWN = re.compile(r"manifest unknown|name unknown|not found|repository name not known", re.I)
_REFUSED = re.compile(r"unauthorized|authentication required|access .*denied|requested access|invalid username", re.I)
_AWAY = re.compile(
    r"no such host|refused|unreachable|timeout|timed out|deadline|connection reset|EOF|server misbehaving", re.I
)


async def fetch(name: str, archive: Path, *, login: tuple[str, str] | None) -> AsyncGenerator[str, None]:
    """Write an image of a registry ("[registry/]repository:tag") to an archive that is not there yet, and yield what
    skopeo says meanwhile. `login` is a user and a password; without one the node's own logins count.

    Raises:
        NotFound, FailedPrecondition, Unavailable, Exhausted, Unsupported: see PullImage in the contract.
    """
    if shutil.which("skopeo") is None:
        raise Unsupported("skopeo is not installed", hint="install skopeo, or import an archive", reason="TOOL_MISSING")
    flags = []
    if login:  # in a file: arguments are for everybody to see
        given = archive.with_name("auth.json")
        secret = base64.b64encode(":".join(login).encode()).decode()
        await asyncio.to_thread(_write_private, given, json.dumps({"auths": {_registry(name): {"auth": secret}}}))
        flags = ["--authfile", str(given)]
    process = await asyncio.create_subprocess_exec(
        *leashed(["skopeo", "copy", *flags, f"docker://{name}", f"oci-archive:{archive}"]),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "TMPDIR": str(archive.parent)},
    )  # fmt: skip
    assert process.stdout is not None
    last = ""
    try:
        async for line in process.stdout:
            last = line.decode(errors="replace").strip() or last
            if not last.startswith("time="):
                yield last
        if await process.wait():
            raise _mapped(name, last)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _registry(name: str) -> str:
    """Return the host of a name, Docker Hub's where it has none (distribution/reference)."""
    first, slash, _ = name.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else "docker.io"


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _mapped(name: str, said: str) -> NetstoreError:
    """Return the error that skopeo's last line means."""
    match = re.search(r'msg="(.*)"$', said)
    text = match[1].replace('\\"', '"') if match else said
    registry = _registry(name)
    if "no space left" in text:
        return Exhausted(f"pulling {name}: no space is left", hint="free some space")
    if _REFUSED.search(text):
        return FailedPrecondition(
            f"{registry} refuses to give {name}: {text}",
            hint=f"`skopeo login {registry}` on the node, or give a user and a password; or there is no such image",
            reason="UNAUTHORIZED",
        )
    if _AWAY.search(text):
        return Unavailable(f"registry {registry} is not reachable: {text}", hint="check its name and the network")
    if _UNKNOWN.search(text):
        return NotFound("image", name, hint=f"{registry} has none of that name and tag")
    return NetstoreError(f"pulling {name}: {text}", reason="REGISTRY")
