"""netstore: networks, volumes and containers of a node, in docker's words.

Nouns are modules, imported when they are used: most of a command's time is imports.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from itertools import pairwise

import click

from netstore import __version__

__all__ = ["main"]

DEFAULT_HOST = "unix:///run/netstore/netstore.sock"  # netstore.client has it, too, but imports gRPC
_WHERE = (
    "  hint: --host or NETSTORE_HOST says where netstored is; TCP needs --tlscacert, --tlscert and --tlskey, or "
    "NETSTORE_CERT_PATH with ca.pem, cert.pem and key.pem"
)

_GROUPS = {
    "network": "Networks.",
    "endpoint": "Attachments of sandboxes to networks.",
    "port": "Published ports.",
    "policy": "What endpoints may say to whom.",
    "service": "One name and address for several endpoints.",
    "volume": "Volumes.",
    "image": "Images.",
    "container": "Containers.",
    "node": "The machines of the cluster.",
    "system": "The node.",
}
_CONTAINER = ("attach", "create", "exec", "kill", "logs", "ps", "restart", "rm", "run", "start", "stop", "wait")
_TOP = {
    **{name: ("container", name) for name in _CONTAINER},
    "images": ("image", "ls"), "load": ("image", "load"), "pull": ("image", "pull"), "rmi": ("image", "rm"),
    "events": ("system", "events"), "info": ("system", "info"),
    "inspect": ("inspect", ""), "completion": ("completion", ""), "hook": ("hooks", ""),
}  # fmt: skip
"""What stands without a noun, as Docker's do: the module, and the command of its group."""


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_GROUPS, *sorted(_TOP)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _GROUPS:
            found = import_module(f"netstore.cli.{cmd_name}").group
        elif cmd_name in _TOP:
            noun, verb = _TOP[cmd_name]
            module = import_module(f"netstore.cli.{noun}")
            found = module.group.commands[verb] if verb else module.command
        else:
            return None
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List names without importing their modules."""
        with formatter.section("Nouns"):
            formatter.write_dl(list(_GROUPS.items()))
        with formatter.section("Commands"):
            formatter.write_text(", ".join(sorted(_TOP)))


@click.group(
    cls=_Lazy,
    context_settings={"help_option_names": ["--help"], "max_content_width": 100},
    epilog="Exit status: 0 success; 1 netstored refused or failed; 2 usage; 3 netstored is not reachable; "
    "run and exec: 125 netstore failed or usage, 126 the command cannot be run, "
    "127 it is not found, else the command's own.",
)
@click.option(
    "-H", "--host", envvar="NETSTORE_HOST", default=DEFAULT_HOST, show_default=True, help="Where netstored is."
)
@click.option("--tlscacert", help="For TCP: certificate of the authority [default: NETSTORE_CERT_PATH/ca.pem].")
@click.option("--tlscert", help="For TCP: our certificate [default: NETSTORE_CERT_PATH/cert.pem].")
@click.option("--tlskey", help="For TCP: our key [default: NETSTORE_CERT_PATH/key.pem].")
@click.version_option(__version__)
@click.pass_context
def cli(ctx: click.Context, /, host: str, **certificates: str | None) -> None:
    """Networks, volumes and containers of a node."""
    from netstore.cli.client import Client

    place = os.environ.get("NETSTORE_CERT_PATH", "")
    defaults = {"tlscacert": "ca.pem", "tlscert": "cert.pem", "tlskey": "key.pem"}
    authority, certificate, key = (
        certificates[flag] or (os.path.join(place, name) if place else "") for flag, name in defaults.items()
    )
    ctx.obj = Client(host, (authority, certificate, key))


def main() -> None:
    """Run the command line; errors of netstored are shown with their hint."""
    import grpc

    from netstore.cli.client import Client, fail
    from netstore.client import AddressError

    try:
        cli.main(standalone_mode=True, prog_name="netstore")
    except grpc.RpcError as error:
        context = click.get_current_context(silent=True)
        address = context.obj.address if context and context.obj else _host_of(sys.argv)
        fail(error, Client(address))
    except AddressError as error:
        click.echo(f"netstore: {error}", err=True)
        click.echo(_WHERE, err=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)


def _host_of(arguments: list[str]) -> str:
    for flag, value in pairwise(arguments):
        if flag in ("-H", "--host"):
            return value
    return os.environ.get("NETSTORE_HOST", DEFAULT_HOST)
