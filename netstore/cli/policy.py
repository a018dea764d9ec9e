"""netstore policy: create, ls, inspect, update, rm, log."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence

import click
from google.protobuf.field_mask_pb2 import FieldMask

from netstore.api.v1 import network_pb2, policy_pb2
from netstore.cli.client import Client, pages, pass_client, tolerant
from netstore.cli.commands import Group
from netstore.cli.completion import names
from netstore.cli.format import by_name, listing, name_of, shapes, short_id, show_objects, size, to_dict
from netstore.cli.grammar import INT32, key_values

__all__ = ["group"]

_POLICY = names("policy")
_PORT = re.compile(r"(?:(\d{1,5})(?:-(\d{1,5}))?/)?(tcp|udp|sctp|icmp)|(\d{1,5})(?:-(\d{1,5}))?")
_ACTIONS = {"allow": network_pb2.POLICY_ACTION_ALLOW, "deny": network_pb2.POLICY_ACTION_DENY}
_SELECTOR = "label=KEY[=VALUE][,label=…] (all of them), or cidr=CIDR; repeated: any of them."


@click.group("policy", cls=Group)
def group() -> None:
    """What endpoints of a network may say to whom."""


def _selectors(texts: Sequence[str], flag: str) -> list[policy_pb2.Selector]:
    return [_selector(text, flag) for text in texts if text != "any"]


def _selector(text: str, flag: str) -> policy_pb2.Selector:
    selector = policy_pb2.Selector()
    for term in text.split(","):
        key, _, value = term.partition("=")
        if key == "label" and value:
            selector.labels.append(value)
        elif key == "cidr" and value and not selector.cidr:
            selector.cidr = value
        else:
            raise click.UsageError(f"{flag}: {text!r}: {_SELECTOR}")
    return selector


def _ports(texts: Sequence[str]) -> list[policy_pb2.PolicyPort]:
    return [_port(text) for text in texts if text != "any"]


def _port(text: str) -> policy_pb2.PolicyPort:
    match = _PORT.fullmatch(text.lower())
    if match is None:
        raise click.UsageError(f"--port: {text!r}: PORT[-PORT][/tcp|udp|sctp], or a protocol: tcp, udp, sctp, icmp")
    first, last, protocol = match[1] or match[4], match[2] or match[5], match[3] or "tcp"
    number = policy_pb2.PolicyProtocol.Value(f"POLICY_PROTOCOL_{protocol.upper()}")
    if first is not None and int(first) == 0:
        raise click.UsageError(f"--port: {text!r}: ports are 1 to 65535")
    return policy_pb2.PolicyPort(protocol=number, first_port=int(first or 0), last_port=int(last or 0))


@group.command()
@click.argument("name")
@click.option(
    "--network", required=True, help="The network whose endpoints it is about.", shell_complete=names("network")
)
@click.option("--from", "sources", multiple=True, help=f"Who begins: {_SELECTOR}")
@click.option("--to", "destinations", multiple=True, help="To whom: the same.")
@click.option("--port", "ports", multiple=True, help="PORT[-PORT][/tcp|udp|sctp], tcp, udp, sctp or icmp.")
@click.option(
    "--action", type=click.Choice([*_ACTIONS]), default="allow", show_default=True, help="What happens to it."
)
@click.option("--label", multiple=True, help="KEY=VALUE of the policy itself.")
@pass_client
def create(client: Client, name: str, network: str, sources: tuple[str, ...], destinations: tuple[str, ...],
           ports: tuple[str, ...], action: str, label: tuple[str, ...]) -> None:  # fmt: skip
    """Allow, or deny, some traffic of a network's endpoints. Replies are included."""
    spec = policy_pb2.PolicySpec(
        network=network, sources=_selectors(sources, "--from"), destinations=_selectors(destinations, "--to"),
        ports=_ports(ports), action=_ACTIONS[action],
    )  # fmt: skip
    policy = policy_pb2.Policy(name=name, labels=key_values(label, "--label"), spec=spec)
    request = policy_pb2.CreatePolicyRequest(policy=policy, request_id=str(uuid.uuid4()))
    click.echo(client.policies.CreatePolicy(request).policy.id)


@group.command()
@click.argument("policy", shell_complete=_POLICY)
@click.option("--from", "sources", multiple=True, help=f"Instead of who began: {_SELECTOR} 'any' for anybody.")
@click.option("--to", "destinations", multiple=True, help="Instead of to whom: the same.")
@click.option("--port", "ports", multiple=True, help="Instead of the ports: as create; 'any' for all of them.")
@click.option("--action", type=click.Choice([*_ACTIONS]), help="What happens to it.")
@click.option("--label-add", multiple=True, help="KEY=VALUE to set.")
@click.option("--label-rm", multiple=True, help="KEY to remove.")
@pass_client
def update(client: Client, policy: str, sources: tuple[str, ...], destinations: tuple[str, ...],
           ports: tuple[str, ...], action: str | None, label_add: tuple[str, ...],
           label_rm: tuple[str, ...]) -> None:  # fmt: skip
    """Change a policy; it takes effect at once."""
    found = client.policies.GetPolicy(policy_pb2.GetPolicyRequest(policy=policy)).policy
    labels = {key: value for key, value in found.labels.items() if key not in label_rm}
    spec = policy_pb2.PolicySpec(
        sources=_selectors(sources, "--from"), destinations=_selectors(destinations, "--to"), ports=_ports(ports),
        action=_ACTIONS[action or "allow"],
    )  # fmt: skip
    asked = {"labels": label_add or label_rm, "spec.sources": sources, "spec.destinations": destinations,
             "spec.ports": ports, "spec.action": action}  # fmt: skip
    mask = FieldMask(paths=[path for path, given in asked.items() if given])
    if not mask.paths:
        raise click.UsageError("nothing to change: give --from, --to, --port, --action, --label-add or --label-rm")
    changed = policy_pb2.Policy(
        id=found.id, etag=found.etag, labels=labels | key_values(label_add, "--label-add"), spec=spec
    )
    client.policies.UpdatePolicy(policy_pb2.UpdatePolicyRequest(policy=changed, update_mask=mask))
    click.echo(policy)


def _who(selectors: Sequence[policy_pb2.Selector]) -> str:
    return "|".join(each.cidr or ",".join(each.labels) for each in selectors) or "any"


def _what(ports: Sequence[policy_pb2.PolicyPort]) -> str:
    shown = []
    for port in ports:
        protocol = name_of(policy_pb2.PolicyProtocol, port.protocol, "POLICY_PROTOCOL")
        last = f"-{port.last_port}" if port.last_port else ""
        shown.append(f"{port.first_port}{last}/{protocol}" if port.first_port else protocol)
    return ",".join(shown) or "any"


@group.command("ls")
@click.option("-f", "--filter", "filters", multiple=True, help="network=, id=, name=, label=, action=.")
@shapes
@pass_client
def ls(client: Client, filters: tuple[str, ...], template: str | None, quiet: bool, no_trunc: bool) -> None:
    """List policies, with what each has counted."""
    found = by_name(pages(client.policies.ListPolicies, policy_pb2.ListPoliciesRequest(filter=filters), "policies"))
    ids = [short_id(policy.id, full=no_trunc) for policy in found]
    rows = [
        (shown, p.name, p.spec.network, name_of(network_pb2.PolicyAction, p.spec.action, "POLICY_ACTION"),
         _who(p.spec.sources), _who(p.spec.destinations), _what(p.spec.ports), str(p.status.packets),
         size(p.status.bytes))
        for shown, p in zip(ids, found, strict=True)
    ]  # fmt: skip
    headers = ("POLICY ID", "NAME", "NETWORK", "ACTION", "FROM", "TO", "PORTS", "PACKETS", "BYTES")
    listing(found, headers, rows, template, quiet=quiet, ids=ids)


@group.command()
@click.argument("policies", nargs=-1, required=True, shell_complete=_POLICY)
@click.option("-f", "--format", "template", default="json", help="'json' (default), or a template.")
@pass_client
def inspect(client: Client, policies: tuple[str, ...], template: str) -> None:
    """Show policies in full."""
    with tolerant(client) as attempt:
        found: list[policy_pb2.Policy] = []
        for name in policies:
            request = policy_pb2.GetPolicyRequest(policy=name)
            attempt(lambda r=request: found.append(client.policies.GetPolicy(r).policy))  # type: ignore[misc]
        show_objects(found, template)


@group.command("rm")
@click.argument("policies", nargs=-1, required=True, shell_complete=_POLICY)
@click.option("-f", "--force", is_flag=True, help="A missing one is a success.")
@pass_client
def rm(client: Client, policies: tuple[str, ...], force: bool) -> None:
    """Remove policies; it takes effect at once."""
    with tolerant(client) as attempt:
        for name in policies:
            request = policy_pb2.DeletePolicyRequest(policy=name, allow_missing=force)
            if attempt(lambda r=request: client.policies.DeletePolicy(r)):  # type: ignore[misc]
                click.echo(name)


def _end(peer: policy_pb2.DropPeer) -> str:
    address = f"[{peer.address}]" if ":" in peer.address and peer.port else peer.address
    return f"{address}{f':{peer.port}' if peer.port else ''}{f' ({peer.name})' if peer.name else ''}"


@group.command("log")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is dropped from now on.")
@click.option("-n", "--tail", type=INT32, default=100, show_default=True, help="How many of the last ones, 0 to 1000.")
@click.option("--filter", "filters", multiple=True, help="network=, policy=, name= (of an endpoint).")
@click.option("--format", "template", help="'json' (one object a line), or a template.")
@pass_client
def log(client: Client, follow: bool, tail: int, filters: tuple[str, ...], template: str | None) -> None:
    """Show packets that policies and defaults dropped; of a flood, some."""
    request = policy_pb2.WatchDropsRequest(filter=filters, tail=tail, follow=follow)
    for response in client.policies.WatchDrops(request):
        drop = response.drop
        if template == "json":
            click.echo(json.dumps(to_dict(drop)))
        elif template:
            show_objects([drop], template)
        else:
            by = f"policy {drop.policy}" if drop.policy else "default"
            more = f" (and {drop.suppressed} before it)" if drop.suppressed else ""
            ends = f"{_end(drop.source)} -> {_end(drop.destination)}"
            click.echo(f"{drop.time.ToJsonString()} {drop.network} {by}: {drop.protocol} {ends}{more}")
