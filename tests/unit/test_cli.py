"""Docker's grammar, and how results are shown."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from netstore.api.v1 import container_pb2, mount_pb2, network_pb2, volume_pb2
from netstore.cli import grammar, mounts
from netstore.cli.commands import Command
from netstore.cli.format import duration, listing, show_objects, size
from netstore.cli.main import cli


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80", [("", 0, 80, 1)]),
        ("8080:80", [("", 8080, 80, 1)]),
        ("127.0.0.1:8080:80/udp", [("127.0.0.1", 8080, 80, 2)]),
        ("127.0.0.1::80", [("127.0.0.1", 0, 80, 1)]),
        ("8000-8001:80-81", [("", 8000, 80, 1, 2, 0)]),
        ("8000-8001:80", [("", 8000, 80, 1, 0, 8001)]),
        ("80-81/sctp", [("", 0, 80, 3), ("", 0, 81, 3)]),
        ("fd00::1:80:81", [("fd00::1", 80, 81, 1)]),
        ("[fd00::1]::81", [("fd00::1", 0, 81, 1)]),
        ("target=80,published=8080,protocol=udp,host_ip=10.0.0.1", [("10.0.0.1", 8080, 80, 2)]),
        ("target=80-82,published=90-92,mode=host", [("", 90, 80, 1, 3, 0)]),
        ("target=80,published=90-92,host_ip=[::1]", [("::1", 90, 80, 1, 0, 92)]),
        ("target=80", [("", 0, 80, 1)]),
        ("8080:80/UDP", [("", 8080, 80, 2)]),
        ("[::1]:80:80", [("::1", 80, 80, 1)]),
        ("0:80", [("", 0, 80, 1)]),
    ],
)
def test_ports(text: str, expected: list) -> None:
    found = [(p.host_ip, p.host_port, p.container_port, p.protocol, p.count, p.host_port_last)
             for p in grammar.parse_port(text)]  # fmt: skip
    assert found == [(*each, 0, 0)[:6] for each in expected]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "80:",
        "80-70",
        "8000-8002:80-81",
        "80/icmp",
        "70000",
        "published=80",
        "target=80,colour=red",
        "target=80,mode=x",
        "target=0",
        "[::1:80:80",
    ],
)
def test_bad_ports(text: str) -> None:
    with pytest.raises(click.UsageError, match="-p"):
        grammar.parse_port(text)


def test_volumes_and_binds() -> None:
    volume = mounts.parse_volume("data:/app:ro,nocopy")
    assert (volume.type, volume.source, volume.target) == (mount_pb2.MOUNT_TYPE_VOLUME, "data", "/app")
    assert volume.read_only
    assert volume.no_copy
    bind = mounts.parse_volume("/srv:/app:rslave")
    assert (bind.type, bind.propagation, bind.create_source) == (mount_pb2.MOUNT_TYPE_BIND, "rslave", True)
    assert mounts.parse_volume("/app").source == ""


def test_mount_keys() -> None:
    mount = mounts.parse_mount("type=tmpfs,dst=/t,tmpfs-size=64m,tmpfs-mode=1770")
    assert (mount.tmpfs_size_bytes, mount.tmpfs_mode) == (64 << 20, 0o1770)
    with pytest.raises(click.UsageError, match="is none of type, "):
        mounts.parse_mount("type=volume,colour=red")


def test_network_values_keep_their_case() -> None:
    attachment = grammar.parse_network("name=App,alias=Web,ip=10.0.0.9")
    assert (attachment.network, list(attachment.aliases), attachment.ipv4_address) == ("App", ["Web"], "10.0.0.9")


@pytest.mark.parametrize(("text", "expected"), [("64m", 64 << 20), ("1.5G", 3 << 29), ("100", 100), ("2kb", 2048)])
def test_sizes(text: str, expected: int) -> None:
    assert grammar.parse_bytes(text, "--size") == expected


def test_numbers_that_the_contract_cannot_hold_are_usage() -> None:
    for parse in (
        lambda: grammar.parse_bytes("99999999999999999999", "--size"),
        lambda: grammar.parse_network("name=a,gw-priority=99999999999"),
        lambda: grammar.parse_network("name=a,gw-priority=-"),
        lambda: grammar.parse_restart("on-failure:99999999999"),
        lambda: grammar.seconds(float("nan"), "--time"),
        lambda: grammar.seconds(float("inf"), "--time"),
        lambda: grammar.seconds(1e20, "--time"),
    ):
        with pytest.raises(click.UsageError):
            parse()
    assert grammar.parse_network("name=a,gw-priority=-5").gateway_priority == -5
    assert (grammar.seconds(1.5, "--time").ToTimedelta().total_seconds(), grammar.seconds(-0.5, "-t").nanos) == (
        1.5,
        -500_000_000,
    )


def test_templates(capsys: pytest.CaptureFixture[str]) -> None:
    network = network_pb2.Network(name="app", labels={"a": "b"}, status=network_pb2.NetworkStatus(mtu=1450))
    show_objects([network], "{{.Name}} {{.Status.Mtu}} {{json .Labels}} {{.status.predefined}}")
    assert capsys.readouterr().out == 'app 1450 {"a": "b"} false\n'
    spec, status = volume_pb2.VolumeSpec(driver="image"), volume_pb2.VolumeStatus(mountpoint="/there")
    volume = volume_pb2.Volume(name="v", spec=spec, status=status, labels=dict.fromkeys("cab", ""))
    show_objects([volume], "{{.Name}} {{.Driver}} {{.Mountpoint}} {{json .Labels}}")  # as Docker's, which knows no spec
    assert capsys.readouterr().out == 'v image /there {"a": "", "b": "", "c": ""}\n'
    network = network_pb2.Network(name="app", status=network_pb2.NetworkStatus(scope=network_pb2.NETWORK_SCOPE_GLOBAL))
    show_objects([network], "{{.Scope}} {{json .Status.Scope}}")
    assert capsys.readouterr().out == 'global "NETWORK_SCOPE_GLOBAL"\n'
    show_objects([volume], '{{.Name}} {{.Label "a"}}{{.Label "nosuch"}}|')
    assert capsys.readouterr().out == "v |\n"
    volume.labels["a"] = "{{.Name}}"
    show_objects([volume], '{{.Label "a"}}')
    assert capsys.readouterr().out == "{{.Name}}\n"
    with pytest.raises(click.UsageError, match=r"'\{\{upper .Name\}\}' is not known"):
        show_objects([network], "{{.Name}} {{upper .Name}}")
    with pytest.raises(click.UsageError, match="no field 'Nome'"):
        show_objects([network], "{{.Nome}}")


def test_templates_of_lists_know_the_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """As Docker's: {{.Names}}, {{.Status}} as the table has it, and titles where a table is asked for."""
    status = container_pb2.ContainerStatus(state=container_pb2.CONTAINER_STATE_RUNNING)
    found = [container_pb2.Container(id="0123456789abcdef", name=name, status=status) for name in ("a", "longer")]
    headers = ("CONTAINER ID", "CREATED", "STATUS", "NAMES")
    rows = [(each.id[:12], "2 days ago", "Up 2 days", each.name) for each in found]

    def shown(template: str) -> list[str]:
        listing(found, headers, rows, template, quiet=False, ids=())
        return capsys.readouterr().out.splitlines()

    assert shown("{{.ID}} {{.Names}}: {{.Status}}, {{.RunningFor}}, {{.Status.State}}") == [
        f"0123456789ab {name}: Up 2 days, 2 days ago, running" for name in ("a", "longer")
    ]
    assert shown(r"table {{.Names}}\t{{.State}}\tis {{.ID}}") == [
        "NAMES    STATE     is CONTAINER ID", "a        running   is 0123456789ab", "longer   running   is 0123456789ab",
    ]  # fmt: skip
    assert '"name": "longer"' in "".join(shown("json"))


def test_lists_of_commands_end_where_a_clause_does() -> None:
    from netstore.cli import container, network, volume

    for group in (container.group, network.group, volume.group):
        with click.Context(group) as context:
            shown = group.get_help(context)
        assert "..." not in shown.partition("Commands:")[2].replace("PRIVATE...", "")


def test_durations_and_sizes() -> None:
    assert [duration(n) for n in (0.5, 1, 5, 61, 7200, 200_000)] == [
        "Less than a second", "1 second", "5 seconds", "1 minute", "2 hours", "2 days",
    ]  # fmt: skip
    assert size(65_870_000) == "65.87MB"


def test_every_command_has_help() -> None:
    runner = CliRunner()
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        names = [[name, sub] for sub in command.commands] if isinstance(command, click.Group) else [[name]]
        for words in names:
            result = runner.invoke(cli, [*words, "--help"])
            assert result.exit_code == 0, (words, result.output)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    assert "_NETSTORE_COMPLETE" in CliRunner().invoke(cli, ["completion", shell]).output


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--force"], (True, [], ())),
        (["--force=true"], (True, [], ())),
        (["--force=false"], (False, [], ())),
        (["-f", "--force=false"], (False, [], ())),
        (["-ev", "a=b", "--force=1"], (True, ["v"], ("a=b",))),
        (["-fe", "v", "--force=f"], (False, ["v"], ())),
        (["-e", "--force=false"], (False, ["--force=false"], ())),
        (["-e", "v", "x", "--force=true"], (True, ["v"], ("x",))),
        (["--", "--force=true"], (False, [], ("--force=true",))),
    ],
)
def test_flags_may_carry_a_value(args: list[str], expected: tuple) -> None:
    @click.command(cls=Command)
    @click.option("-f", "--force", is_flag=True)
    @click.option("-e", "--env", multiple=True)
    @click.argument("rest", nargs=-1)
    def command(force: bool, env: tuple[str, ...], rest: tuple[str, ...]) -> None:
        click.echo(repr((force, list(env), rest)))

    assert CliRunner().invoke(command, args).output.strip() == repr(expected)
    assert CliRunner().invoke(command, ["--force=perhaps"]).exit_code == 2
