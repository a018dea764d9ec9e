"""kill -9, drift, and things that disappear: containers go on, and store and kernel agree again."""

from __future__ import annotations

import subprocess

from conftest import BIN, Node, wait_until


def test_kill_9_leaves_traffic_names_and_ports(node: Node, image: str) -> None:
    node.cli("network", "create", "app")
    node.cli(
        "run",
        "-d",
        "--name",
        "web",
        "--network",
        "app",
        "-p",
        "8080:80",
        image,
        "httpd",
        "-f",
        "-p",
        "80",
        "-h",
        "/data",
    )
    node.cli("run", "-d", "--name", "b", "--network", "app", image)
    pid = node.out("inspect", "-f", "{{.Status.Pid}}", "b")
    node.kill()
    inside = ["nsenter", "-t", pid, "-n", "-m", "/bin/busybox"]
    assert "Address" in node.host.run(*inside, "nslookup", "web").stdout
    assert node.host.sh("curl -sm3 http://127.0.0.1:8080/hello") == "from the image\n"
    node.start()
    assert sorted(node.out("ps", "--format", "{{.Name}}").split()) == ["b", "web"]
    assert node.out("system", "check") == "kernel and store agree"
    assert node.out("exec", "b", "wget", "-qO-", "http://web/hello") == "from the image"
    node.cli("stop", "-t", "0", "b")
    assert "Exited (137)" in node.out("ps", "-a")


def test_exit_while_the_daemon_is_away_is_known_afterwards(node: Node, image: str) -> None:
    node.cli("run", "-d", "--name", "short", image, "sh", "-c", "sleep 1; exit 3")
    pid = node.out("inspect", "-f", "{{.Status.Pid}}", "short")
    node.kill()
    wait_until(lambda: node.host.run("kill", "-0", pid, check=False).returncode, what="the container to end")
    wait_until(lambda: any((node.place / "run/exits").iterdir()), what="its exit code")
    node.start()
    assert "Exited (3)" in node.out("ps", "-a")


def test_resolver_restart_loses_no_question(node: Node, image: str) -> None:
    node.cli("network", "create", "app")
    node.cli("run", "-d", "--name", "a", "--network", "app", image)
    assert node.resolver
    node.resolver.kill()
    node.resolver.wait()
    asking = subprocess.Popen(
        node.host.command(str(BIN / "netstore"), "-H", node.address, "exec", "a", "nslookup", "a"),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    node.start_resolver()
    assert "Address" in asking.communicate(timeout=20)[0]


def test_a_flushed_firewall_and_a_deleted_bridge_come_back(node: Node, image: str) -> None:
    node.cli("network", "create", "app")
    node.cli(
        "run",
        "-d",
        "--name",
        "web",
        "--network",
        "app",
        "-p",
        "8080:80",
        image,
        "httpd",
        "-f",
        "-p",
        "80",
        "-h",
        "/data",
    )
    bridge = node.out("network", "inspect", "-f", "{{.Status.Interface}}", "app")
    node.host.sh("nft flush ruleset")
    wait_until(lambda: "8080" in node.host.sh("nft list ruleset"), what="the firewall")
    node.host.sh(f"ip link del {bridge}")
    wait_until(
        lambda: node.host.sh("curl -sm1 http://127.0.0.1:8080/hello || true") == "from the image\n", what="the bridge"
    )
    wait_until(lambda: "agree" in node.cli("system", "check", check=False).stdout, what="agreement")


def test_a_namespace_that_ended_gives_its_address_back(node: Node) -> None:
    node.cli("network", "create", "app")
    path = node.host.netns("engine")
    node.cli("network", "connect", "app", "--netns", path)
    node.host.sh("ip netns del engine")
    found = node.cli("system", "check", check=False)
    assert found.returncode == 1
    assert "its network namespace is gone" in found.stdout
    node.cli("system", "check", "--repair")
    assert node.out("endpoint", "ls", "-q") == ""
    node.cli("network", "rm", "app")


def test_two_daemons_do_not_share_a_state_directory(node: Node) -> None:
    paths = ["--state-dir", str(node.place / "state"), "--run-dir", str(node.place / "run2")]
    second = node.host.run(str(BIN / "netstored"), *paths, check=False)
    assert second.returncode == 1
    assert "another netstored uses" in second.stderr


def test_sigterm_leaves_containers(node: Node, image: str) -> None:
    node.cli("run", "-d", "--name", "c", image)
    pid = node.out("inspect", "-f", "{{.Status.Pid}}", "c")
    assert node.daemon
    node.daemon.terminate()
    assert node.daemon.wait(timeout=20) == 0
    node.host.run("kill", "-0", pid)
    node.start()
    assert node.out("ps", "--format", "{{.Name}}") == "c"


def test_repairs_leave_alone_what_is_being_made(node: Node, image: str) -> None:
    """Containers and endpoints come and go while checks run: nothing of theirs is taken for garbage."""
    node.cli("network", "create", "app")
    checking = subprocess.Popen(
        node.host.command("sh", "-c", f"while sleep 0.01; do {BIN}/netstore -H {node.address} system check --repair; done"),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for index in range(12):
            node.cli("run", "-d", "--name", f"c{index}", "--network", "app", "-p", f"{9000 + index}:80", image)
            assert "Address" in node.out("exec", f"c{index}", "nslookup", f"c{index}")
            if index % 3 == 2:
                node.cli("rm", "-f", f"c{index - 1}")
    finally:
        checking.kill()
        checking.communicate()
    assert node.out("system", "check") == "kernel and store agree"
