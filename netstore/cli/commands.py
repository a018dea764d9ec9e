"""Groups and commands with Docker's habits: boolean flags that may carry a value, and second names of commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from netstore.cli.grammar import truth

__all__ = ["Command", "Group", "Launching"]

_CLAUSES = (re.compile(r"[;:] | \("), re.compile(r", "))
_SECOND_NAMES = {"list": "ls", "remove": "rm"}


class Command(click.Command):
    """Takes `--flag=true` and `--flag=false` for every flag without a value, as Docker (Go's pflag) does."""

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return as much of the first sentence as a list of commands has room for, cut where a clause ends."""
        text = " ".join((self.help or "").split("\n\n")[0].split())
        sentence = text.partition(". ")[0].removesuffix(".")
        if len(sentence) <= limit:
            return sentence
        ends = ([each.start() for each in clause.finditer(sentence[:limit])] for clause in _CLAUSES)
        found = next(filter(None, ends), None)
        return sentence[: found[-1]] if found else super().get_short_help_str(limit)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; what a flag was given as its value wins over the flag's presence."""
        options = {name: each for each in self.params if isinstance(each, click.Option) for name in each.opts}
        kept, given, left = [], dict[str, bool](), list(args)
        while left:
            arg = left.pop(0)
            name, separator, value = arg.partition("=")
            option = options.get(name) if name.startswith("--") else None
            if arg == "--" or (not ctx.allow_interspersed_args and not arg.startswith("-")):
                kept += [arg, *left]
                break
            if separator and option and option.is_flag:
                given[option.name or ""] = truth(value, name)
                continue
            kept.append(arg)
            if left and _takes_next(arg, options):
                kept.append(left.pop(0))
        rest = super().parse_args(ctx, kept)
        ctx.params.update(given)
        return rest


class Launching(Command):
    """run, create and exec: wrong usage ends with 125, as Docker's; 2 may be the command's own."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse."""
        with _as_failure():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Carry it out."""
        with _as_failure():
            return super().invoke(ctx)


@contextmanager
def _as_failure() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        error.exit_code = 125  # type: ignore[misc]  # click reads it of the instance
        raise


def _takes_next(arg: str, options: dict[str, click.Option]) -> bool:
    """Say whether the argument behind this one is its value."""
    # Short flags may be one word, of which the last may take a value.
    names = [arg] if arg.startswith("--") else [f"-{letter}" for letter in arg[1:]]
    found = [options.get(name) for name in names]
    flags = [option is not None and (option.is_flag or option.count) for option in found]
    return bool(found) and found[-1] is not None and all(flags[:-1]) and not flags[-1]


class Group(click.Group):
    """A noun: its commands are `Command`s."""

    command_class = Command

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Find a command by its name or Docker's second one."""
        return super().get_command(ctx, cmd_name) or super().get_command(ctx, _SECOND_NAMES.get(cmd_name, ""))
