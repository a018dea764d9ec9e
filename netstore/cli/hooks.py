"""netstore hook, where the command line does not begin with it."""

from __future__ import annotations

import sys

import click

from netstore.cli.commands import Command
from netstore.cli.hook import SOCKET, run

__all__ = ["command"]


@click.command("hook", cls=Command)
@click.argument("stage", type=click.Choice(["createRuntime", "prestart", "poststop"]))
@click.option("--socket", default=SOCKET, show_default=True, help="Where netstored listens for hooks.")
def command(stage: str, socket: str) -> None:
    """Be an OCI runtime's hook: attach what annotations of the container on standard input ask for, or detach it."""
    sys.exit(run(stage, socket))
