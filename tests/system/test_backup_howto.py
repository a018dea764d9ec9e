"""docs/howto/back-up-a-database.md with a real Redis from Debian: its own commands, under load, and the data checked."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from conftest import BIN, Node, wait_until

ROOT = Path(__file__).parents[2]
HOOK = (
    'cd "$1" && cp usr/share/base-passwd/passwd.master etc/passwd && cp usr/share/base-passwd/group.master etc/group'
    " && mkdir -p tmp run data"
)


@pytest.fixture(scope="module")
def redis_tar() -> Path:
    """A root filesystem with Debian's redis-server; made once, because that needs the network."""
    tar = ROOT / ".peers/redis.tar"
    if not tar.exists():
        tar.parent.mkdir(exist_ok=True)
        draft = tar.with_suffix(".draft.tar")
        lists = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*.sources")]
        packages = "redis-server,busybox-static,libc-bin,coreutils,dash,base-passwd"
        subprocess.run(
            ["mmdebstrap", "-q", "--variant=extract", f"--include={packages}", f"--extract-hook={HOOK}", "bookworm", draft,
             *(path for path in lists if path.exists())], check=True,
        )  # fmt: skip
        draft.rename(tar)
    return tar


def blocks() -> list[list[str]]:
    """The commands of the page, block by block."""
    text = (ROOT / "docs/howto/back-up-a-database.md").read_text()
    return [re.findall(r"^    (.+)$", block, re.M) for block in re.findall(r"(?:^    .+\n)+", text, re.M)]


def follow(node: Node, commands: list[str]) -> None:
    for command in commands:
        words = f"{BIN}/netstore -H {node.address} {command.removeprefix('netstore ')}"
        done = node.host.run("sh", "-c", f"cd {node.place} && {words}", check=False, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def ask(node: Node, container: str, *words: str) -> str:
    return node.cli("exec", container, "redis-cli", *words, check=False).stdout.strip()


def counter(node: Node, container: str) -> int:
    return int(ask(node, container, "get", "n") or 0)


@pytest.mark.timeout(180)
def test_the_page_holds(node: Node, redis_tar: Path) -> None:
    node.cli("image", "import", str(redis_tar), "redis:latest")
    setup, backup, keep, restore, elsewhere = blocks()
    follow(node, setup)
    wait_until(lambda: ask(node, "redis", "ping") == "PONG", what="redis")
    writing = node.host.command(
        str(BIN / "netstore"), "-H", node.address, "exec", "redis", "redis-cli", "-r", "100000000", "incr", "n"
    )
    writer = subprocess.Popen(writing, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: counter(node, "redis") > 100, what="writes")
    moments = [counter(node, "redis")]
    follow(node, backup)
    moments.append(counter(node, "redis"))
    follow(node, keep)
    moments.append(counter(node, "redis"))
    frozen = float(node.out("volume", "snapshot", "inspect", "-f", "{{.Status.FrozenTime}}", "db@monday").rstrip("s"))
    assert 0 < frozen < 5
    wait_until(lambda: counter(node, "redis") > moments[-1], what="it to go on")
    writer.kill()
    writer.wait()
    ask(node, "redis", "flushall")
    ask(node, "redis", "set", "n", "-1")
    follow(node, restore)
    wait_until(lambda: ask(node, "redis", "ping") == "PONG", what="redis")
    restored = counter(node, "redis")
    assert moments[1] <= restored <= moments[2]
    follow(node, elsewhere)
    wait_until(lambda: ask(node, "redis2", "ping") == "PONG", what="the other redis")
    exported = counter(node, "redis2")
    assert moments[0] <= exported <= moments[1]
    ask(node, "redis2", "incr", "n")
    assert (counter(node, "redis"), counter(node, "redis2")) == (restored, exported + 1)
    assert node.out("system", "check") == "kernel and store agree"
