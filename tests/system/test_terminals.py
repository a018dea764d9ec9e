"""Terminals and input: run -it, exec -it, attach, as at a person's terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

from conftest import BIN, SLOWER, Node, wait_until


class Person:
    """Somebody at a terminal who runs one command of netstore."""

    def __init__(self, node: Node, *args: str) -> None:
        self._master, slave = pty.openpty()
        self.resize(30, 100)
        self.before = termios.tcgetattr(slave)
        self._slave = slave
        command = node.host.command(str(BIN / "netstore"), "--host", node.address, *args)
        self.process = subprocess.Popen(["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave)
        self.seen = ""

    def types(self, text: str) -> None:
        os.write(self._master, text.encode())

    def sees(self, text: str, *, seconds: float = 15, asking: str = "") -> None:
        """Wait for a text; `asking` is typed again and again until it is there."""
        end = time.monotonic() + SLOWER * seconds
        self.types(asking)
        while text not in self.seen:
            ready, _, _ = select.select([self._master], [], [], 0.5)
            if ready:
                self.seen += os.read(self._master, 65536).decode(errors="replace")
            else:
                self.types(asking)
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
        self.seen = self.seen.partition(text)[2]

    def is_heard(self) -> bool:
        """Say whether what we type goes on as it is."""
        return termios.tcgetattr(self._slave) != self.before

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def leaves_with(self) -> int:
        code = self.process.wait(timeout=SLOWER * 20)
        assert termios.tcgetattr(self._slave) == self.before, "our terminal stays raw"
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)


@contextmanager
def person(node: Node, *args: str) -> Iterator[Person]:
    made = Person(node, *args)
    try:
        yield made
    finally:
        made.close()


def test_run_with_a_terminal(node: Node, image: str) -> None:
    with person(node, "run", "-it", "--rm", "--name", "c", image, "sh") as someone:
        someone.sees("/ # ")
        someone.types("busybox stty size; echo $TERM; busybox tty\n")
        someone.sees("30 100\r\nxterm\r\n/dev/pts/0")  # its first size is ours
        someone.resize(40, 120)
        someone.sees("40 120", asking="busybox stty size\n")
        someone.types("echo be''gun; sleep 100\n")
        someone.sees("begun")
        wait_until(lambda: "sleep 100" in node.out("exec", "c", "ps"), what="what is to be interrupted")
        someone.types("\x03")  # a key, not a signal to us
        someone.sees("/ # ")
        someone.types("exit 7\n")
        assert someone.leaves_with() == 7
    assert node.out("ps", "-aq") == ""


def test_one_leaves_and_comes_back(node: Node, image: str) -> None:
    with person(node, "run", "-it", "--name", "c", image, "sh") as someone:
        someone.sees("/ # ")
        someone.types("x=kept\n")
        someone.types("\x10")
        someone.types("\x11")
        assert someone.leaves_with() == 0
    assert node.out("ps", "--format", "{{.Name}}") == "c"
    node.kill()
    node.start()  # conmon holds the terminal, not netstored
    with person(node, "attach", "c") as first, person(node, "attach", "c") as second:
        for each in (first, second):
            wait_until(each.is_heard)
        first.types("\necho $x\n")
        for each in (first, second):
            each.sees("kept")
        second.types("exit 3\n")
        assert (first.leaves_with(), second.leaves_with()) == (3, 3)
    refused = node.cli("attach", "c", check=False)
    assert "netstore start -ai c" in refused.stderr
    with person(node, "start", "-ai", "c") as someone:
        someone.sees("/ # ")
        someone.types("exit\n")
        assert someone.leaves_with() == 0
    node.cli("rm", "c")


def test_exec_with_a_terminal(node: Node, image: str) -> None:
    node.cli("run", "-d", "--name", "c", image)
    with person(node, "exec", "-it", "c", "sh") as someone:
        someone.sees("/ # ")
        someone.types("busybox stty size\n")
        someone.sees("30 100")
        someone.resize(25, 70)
        someone.sees("25 70", asking="busybox stty size\n")
        someone.types("x=1\x10\x11\n")  # keys that detach only where one attaches
        someone.types("exit 5\n")
        assert someone.leaves_with() == 5
    with person(node, "exec", "-it", "c", "nosuch") as someone:
        assert someone.leaves_with() == 127
    with person(node, "exec", "-it", "c", "sh") as someone:
        someone.sees("/ # ")
        someone.process.send_signal(signal.SIGKILL)  # who had it is gone: its process hangs up
    wait_until(lambda: "sh" not in node.out("exec", "c", "ps", "-o", "comm").splitlines())
    refused = node.cli("exec", "-it", "c", "sh", check=False, stdin="")
    assert refused.returncode == 125
    assert "not a terminal" in refused.stderr


def test_run_with_input_and_no_terminal(node: Node, image: str) -> None:
    many = "line\n" * 50_000
    done = node.cli("run", "-i", "--rm", image, "cat", stdin=many)
    assert done.stdout == many
    done = node.cli("run", "-i", "--rm", image, "sh", "-c", "cat >&2; exit 4", stdin="to the other\n", check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "to the other\n", 4)
    refused = node.cli("run", "-i", image, "nosuch", stdin="", check=False)
    assert refused.returncode == 127
    node.cli("create", "--name", "deaf", image)
    assert "takes no input" in node.cli("start", "-i", "deaf", check=False, stdin="").stderr
    assert node.out("ps", "-q") == ""  # it was not started
