"""How a command comes by its client, and how errors of netstored are shown.

Exit statuses: 0 success; 1 netstored refused or failed; 2 usage; 3 netstored is not reachable; for run and exec 125
when netstore failed, 126 and 127 when the command cannot be run or is not found, else the command's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import click
import grpc

from netstore.client import BlockingClient as Client
from netstore.client import Problem, pages

__all__ = ["FAILED", "UNREACHABLE", "Client", "Problem", "fail", "pages", "pass_client", "tolerant"]

FAILED, UNREACHABLE = 1, 3

pass_client = click.make_pass_decorator(Client)


def fail(error: grpc.RpcError, client: Client, *, status: int = FAILED) -> NoReturn:
    """Show an error and leave."""
    sys.exit(show(error, client, status=status))


def show(error: grpc.RpcError, client: Client, *, status: int = FAILED) -> int:
    """Show an error on standard error and return the exit status that goes with it."""
    problem = Problem.of(error)
    message, hint = problem.message, problem.hint
    if problem.unreachable:
        message = f"netstored is not reachable at {client.address}"
        hint = "start it (systemctl start netstored), or name another with --host or NETSTORE_HOST"
        status = UNREACHABLE if status == FAILED else status
    click.echo(f"netstore: {message}", err=True)
    if hint:
        click.echo(f"  hint: {hint}", err=True)
    return status


@contextmanager
def tolerant(client: Client) -> Iterator[Callable[[Callable[[], object]], bool]]:
    """Give a function that runs one of several calls, shows its error and says whether it succeeded.

    When one failed, the exit status is 1 in the end.
    """
    statuses: list[int] = []

    def attempt(call: Callable[[], object]) -> bool:
        try:
            call()
        except grpc.RpcError as error:
            statuses.append(show(error, client))
            return False
        return True

    yield attempt
    if statuses:
        sys.exit(statuses[0])
