"""The whole path: CLI and gRPC to the kernel and back, with real containers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import Node, wait_until

ROOT = Path(__file__).parents[2]


def address(node: Node, network: str, name: str) -> str:
    found = json.loads(
        node.out("endpoint", "ls", "--filter", f"network={network}", "--filter", f"name={name}", "--format", "json")
    )
    return found[0]["status"]["addresses"][0].split("/")[0]


def curl(node: Node, url: str, *, netns: str = "") -> str:
    inside = ["ip", "netns", "exec", netns] if netns else []
    return node.host.run(*inside, "curl", "-sS", "-m", "3", url, check=False).stdout


def test_run_publish_and_names(node: Node, image: str) -> None:
    node.cli("network", "create", "app")
    node.cli("network", "create", "other")
    web = ["run", "-d", "--name", "web", "--network", "app", "-p", "8080:80", "-p", "127.0.0.1:9090:80", image]
    node.cli(*web, "httpd", "-f", "-v", "-p", "80", "-h", "/data")
    wait_until(lambda: curl(node, "http://127.0.0.1:8080/hello"), what="httpd")
    for url in ("127.0.0.1:8080", "203.0.113.1:8080", "127.0.0.1:9090"):
        assert curl(node, f"http://{url}/hello") == "from the image\n"
    assert curl(node, "http://203.0.113.1:8080/hello", netns="neighbour") == "from the image\n"
    assert "203.0.113.2" in node.cli("logs", "web").stderr  # the client's own address is seen
    # What is bound to loopback stays there, whoever is on the link.
    node.host.sh("ip -n neighbour route add 127.0.0.9/32 via 203.0.113.1 2>/dev/null || true", check=False)
    assert curl(node, "http://203.0.113.1:9090/hello", netns="neighbour") == ""
    # Unpublished ports are not reached by routing to the container.
    node.host.sh("ip -n neighbour route add 172.16.0.0/12 via 203.0.113.1")
    assert curl(node, f"http://{address(node, 'app', 'web')}/hello", netns="neighbour") == ""

    node.cli("run", "-d", "--name", "friend", "--network", "name=app,alias=Buddy", image)
    node.cli("run", "-d", "--name", "stranger", "--network", "other", image)
    assert node.out("exec", "friend", "wget", "-qO-", "http://web/hello") == "from the image"
    assert node.out("exec", "web", "wget", "-qO-", "http://203.0.113.1:8080/hello") == "from the image"  # hairpin
    assert node.out("exec", "stranger", "wget", "-qO-", "http://203.0.113.1:8080/hello") == "from the image"
    assert "Address" in node.out("exec", "web", "nslookup", "buddy")
    assert node.cli("exec", "stranger", "nslookup", "web", check=False).returncode
    direct = f"http://{address(node, 'app', 'web')}/hello"
    assert node.cli("exec", "stranger", "wget", "-T", "1", "-qO-", direct, check=False).returncode


def test_hot_connect_internal_and_default_route(node: Node, image: str) -> None:
    node.cli("network", "create", "app")
    node.cli("network", "create", "--internal", "--subnet", "10.77.0.0/24", "vault")
    node.cli("run", "-d", "--name", "c", "--network", "app", image)
    node.cli("network", "connect", "--ip", "10.77.0.77", "--mac-address", "02:00:00:00:00:77", "vault", "c")
    shown = node.out("exec", "c", "ip", "addr", "show", "eth1")
    assert "10.77.0.77/24" in shown
    assert "02:00:00:00:00:77" in shown
    assert "default via 172.18.0.1 dev eth0" in node.out("exec", "c", "ip", "route")
    node.cli("network", "disconnect", "app", "c")
    assert "default" not in node.out("exec", "c", "ip", "route")
    assert node.cli("exec", "c", "ping", "-c1", "-W1", "203.0.113.2", check=False).returncode
    refused = node.cli("network", "rm", "vault", check=False)
    assert refused.returncode == 1
    assert "has 1 endpoint(s): c" in refused.stderr


def test_restart_keeps_sandbox_address_and_joined(node: Node, image: str) -> None:
    node.cli("network", "create", "app")
    node.cli("run", "-d", "--name", "main", "--network", "app", image)
    node.cli("run", "-d", "--name", "side", "--network", "container:main", image)
    before = node.out("exec", "side", "ip", "addr", "show", "eth0")
    node.cli("stop", "-t", "0", "main")
    assert node.out("exec", "side", "ip", "addr", "show", "eth0") == before
    node.cli("start", "main")
    assert node.out("exec", "main", "ip", "addr", "show", "eth0") == before
    refused = node.cli("rm", "-f", "main", check=False)
    assert "side joined" in refused.stderr


def test_exit_codes_logs_and_exec(node: Node, image: str) -> None:
    assert node.cli("run", "--rm", image, "sh", "-c", "echo out; echo err >&2; exit 7", check=False).returncode == 7
    missing = node.cli("run", "--rm", image, "nosuch", check=False)
    assert missing.returncode == 127
    assert "netstore:" in missing.stderr
    for unfit in ("/etc/noexec", "/etc"):
        assert node.cli("run", "--rm", image, unfit, check=False).returncode == 126
    assert node.cli("rm", "-f", "nosuch", check=False).returncode == 0
    missing = node.cli("run", "--rm", "--mount", "type=image,src=nosuch,dst=/x", image, "true", check=False)
    assert (missing.returncode, missing.stderr.splitlines()[0]) == (125, "netstore: no such image: nosuch")
    assert node.cli("run", "nosuchimage", check=False).returncode == 125
    node.cli(
        "run", "-d", "--name", "talk", image, "sh", "-c", "for i in 1 2 3; do echo $i; done; echo e >&2; sleep 1000"
    )
    wait_until(lambda: node.cli("logs", "talk").stderr == "e\n", what="the log")
    assert node.cli("logs", "--tail", "2", "talk").stdout == "3\n"
    everything = node.cli("logs", "talk").stdout
    for since in ("1h30m", "2026-01-01T00:00:00Z", "1700000000"):
        assert node.cli("logs", "--since", since, "talk").stdout == everything
    assert node.cli("logs", "--since", "2100-01-01T00:00:00Z", "talk").stdout == ""
    assert "'yesterday' is neither a time" in node.cli("logs", "--since", "yesterday", "talk", check=False).stderr
    assert node.cli("exec", "-i", "talk", "cat", stdin="typed").stdout == "typed"
    assert node.cli("exec", "talk", "sh", "-c", "exit 5", check=False).returncode == 5
    assert node.cli("exec", "talk", "nosuch", check=False).returncode == 127
    assert node.out(
        "exec", "-u", "app", "-w", "/data", "-e", "A=b", "talk", "sh", "-c", "id -u; id -G; pwd; echo $A"
    ) == ("1000\n1000 2000\n/data\nb")
    for wrong in (
        ["run", "--bogus"],
        ["create", "-p", "x", image],
        ["exec", "--bogus", "talk", "true"],
        ["exec", "talk"],
    ):
        assert node.cli(*wrong, check=False).returncode == 125, wrong
    node.cli("kill", "talk")
    assert node.out("wait", "talk") == "137"
    assert "Exited (137)" in node.out("ps", "-a")


def test_exec_detached_goes_on_by_itself(node: Node, image: str) -> None:
    node.cli("run", "-d", "--name", "c", image, "sh", "-c", "while :; do sleep 1000; done")
    # It waits for what we do after the command returned; what it prints then must not end it.
    waiting = "until [ -e /data/go ]; do sleep 0.05; done; echo out && echo err >&2 && echo done > /data/seen"
    assert node.out("exec", "-d", "c", "sh", "-c", waiting) == ""
    node.cli("exec", "c", "touch", "/data/go")
    wait_until(lambda: node.cli("exec", "c", "cat", "/data/seen", check=False).stdout == "done\n", what="its end")
    for command, code in (("nosuch", 127), ("/etc", 126)):
        refused = node.cli("exec", "-d", "c", command, check=False)
        assert (refused.returncode, command in refused.stderr) == (code, True), refused
    refused = node.cli("exec", "-d", "-t", "c", "true", check=False)
    assert (refused.returncode, "--detach goes without" in refused.stderr) == (125, True)


def test_users_are_never_root_by_mistake(node: Node, image: str) -> None:
    for user in ("4294967296", "4294967295", "2147483648", "0:99999999999", "app:4294967296", "\u00b2"):
        done = node.cli("run", "--rm", "-u", user, image, "id", check=False)
        assert (done.returncode, "is not accepted" in done.stderr) == (125, True), user
    assert node.out("run", "--rm", "-u", "2147483647:5", image, "id", "-u") == "2147483647"
    assert node.out("run", "--rm", "-u", "app", image, "id", "-G") == "1000 2000"
    assert node.out("ps", "-aq") == ""


def test_flags_of_networks_do_not_go_with_a_container_that_is_joined(node: Node, image: str) -> None:
    node.cli("run", "-d", "--name", "first", image)
    for flags in (["--ip", "10.0.0.9"], ["--network-alias", "x"], ["--link", "a"], ["--bandwidth-in", "1mbit"]):
        done = node.cli("run", "--network", "container:first", *flags, image, "true", check=False)
        assert (done.returncode, flags[0] in done.stderr) == (125, True)
    assert "names no container" in node.cli("run", "--network", "container:", image, "true", check=False).stderr
    assert node.out("ps", "-a", "--format", "{{.Names}}") == "first"


def test_volumes_copy_up_and_protection(node: Node, image: str) -> None:
    node.cli("run", "--rm", "-v", "kept:/data", image, "true")
    data = Path(json.loads(node.out("volume", "inspect", "kept"))[0]["status"]["mountpoint"])
    assert (data / "hello").read_text() == "from the image\n"
    assert ((data / "hello").stat().st_uid, (data / "hello").stat().st_mode & 0o777) == (1000, 0o640)
    assert (data / "hello").stat().st_ino == (data / "twin").stat().st_ino
    node.cli("run", "--rm", "-v", "kept:/data", image, "sh", "-c", "echo mine > /data/hello")
    assert node.out("run", "--rm", "-v", "kept:/data:ro", image, "cat", "/data/hello") == "mine"
    assert node.cli("run", "--rm", "-v", "kept:/data:ro", image, "touch", "/data/x", check=False).returncode
    node.cli("create", "--name", "idle", "-v", "kept:/data", image)
    refused = node.cli("volume", "rm", "kept", check=False)
    assert "volume kept is in use by idle" in refused.stderr
    node.cli("rm", "idle")
    node.cli("run", "--rm", "-v", "/anonymous", image, "true")
    assert node.out("volume", "ls", "-q") == "kept"
    node.cli("volume", "rm", "kept")
    assert not data.exists()
    assert node.out(
        "run", "--rm", "--tmpfs", "/t:size=1m,mode=700", image, "sh", "-c", "mount | grep ' /t '"
    ).startswith("tmpfs on /t")


def test_host_and_none(node: Node, image: str) -> None:
    assert "203.0.113.1" in node.out("run", "--rm", "--network", "host", image, "ip", "addr", "show", "uplink")
    assert "eth0" not in node.out("run", "--rm", "--network", "none", image, "ip", "link")
    warned = node.cli("run", "--rm", "--network", "host", "-p", "80:80", image, "true")
    assert "discarded" in warned.stderr


def test_containment_is_as_tight_as_dockers(node: Node, image: str) -> None:
    status = node.out("run", "--rm", image, "cat", "/proc/self/status")
    assert "CapEff:\t00000000a80425fb" in status  # Docker's fourteen capabilities
    assert "Seccomp:\t2" in status
    for path in ("/proc/kcore", "/proc/keys"):
        assert node.out("run", "--rm", image, "sh", "-c", f"cat {path} | head -c 1 2>/dev/null | true") == ""
    assert node.cli("run", "--rm", image, "sh", "-c", "echo 1 > /proc/sys/kernel/panic", check=False).returncode
    assert node.cli("run", "--rm", "--read-only", image, "touch", "/x", check=False).returncode


def test_an_engine_attaches_its_own_namespace(node: Node, image: str) -> None:
    node.cli("network", "create", "app")
    node.cli("run", "-d", "--name", "c", "--network", "app", image)
    path = node.host.netns("engine")
    example = node.host.command(sys.executable, str(ROOT / "examples/attach.py"), node.address, "app", path)
    assert subprocess.run(example, capture_output=True, text=True, check=True).stdout.startswith("eth0 172.")
    assert node.out("exec", "c", "ping", "-c1", "-W2", "engine")
    node.cli("network", "disconnect", "app", "--netns", path)
    assert "eth0" not in node.host.sh("ip -n engine link")
    assert node.host.sh("ip netns exec engine nft list ruleset") == ""


def test_backup_events_and_df(node: Node, image: str, place: Path) -> None:
    node.cli("volume", "create", "v")
    node.cli("system", "backup", str(place / "copy.db"))
    assert (place / "copy.db").read_bytes().startswith(b"SQLite format 3")
    assert "volume create v" in node.out("system", "events", "--since", "0", "--until-now")
    assert "Images" in node.out("system", "df")
