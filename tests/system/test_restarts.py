"""docker run --restart: containers that are started again by themselves, and those that are left alone."""

from __future__ import annotations

import os
import signal
import socket

import grpc
import pytest
from conftest import SLOWER, Node, wait_until

from netstore.api.v1 import container_pb2
from netstore.client import BlockingClient as Client


def shown(node: Node, name: str, field: str) -> str:
    return node.out("inspect", "-f", f"{{{{.{field}}}}}", name)


def runs(node: Node, name: str) -> bool:
    return name in node.out("ps", "--format", "{{.Name}}").split()


def pid(node: Node, name: str) -> int:
    return int(shown(node, name, "Status.Pid"))


def test_policies_while_the_daemon_runs(node: Node, image: str) -> None:
    node.cli("run", "-d", "--restart", "on-failure:2", "--name", "fails", image, "sh", "-c", "echo tried; exit 3")
    wait_until(lambda: node.out("logs", "fails").count("tried") == 3, what="two restarts")
    wait_until(lambda: (shown(node, "fails", "Status.RestartCount"), runs(node, "fails")) == ("2", False))
    node.cli("run", "-d", "--restart", "always", "--name", "loops", image, "sh", "-c", "exit 3")
    wait_until(lambda: int(shown(node, "loops", "Status.RestartCount")) > 3, what="a pause between restarts")
    wait_until(lambda: shown(node, "loops", "State") == "restarting", what="the next pause")
    assert "Restarting (3)" in node.out("ps", "--filter", "status=restarting")
    assert "loops" in node.out("ps")
    node.cli("stop", "loops")
    assert shown(node, "loops", "State") == "exited"
    node.cli("run", "-d", "--restart", "on-failure", "--name", "ends", image, "true")
    node.cli("run", "-d", "--restart", "always", "--name", "a", "-p", "8080:80", image, "httpd", "-f", "-h", "/data")
    address, first = node.out("exec", "a", "hostname", "-i"), pid(node, "a")
    node.host.sh(f"kill -9 {first}")
    wait_until(lambda: pid(node, "a") not in (0, first), what="a restart")
    assert node.out("exec", "a", "hostname", "-i") == address
    asked = node.host.run("ip", "netns", "exec", "neighbour", "curl", "-s", "203.0.113.1:8080/hello")
    assert asked.stdout == "from the image\n"
    assert shown(node, "ends", "Status.RestartCount") == "0"
    node.cli("stop", "-t", "0", "a")
    assert not runs(node, "a")
    node.cli("start", "a")
    assert shown(node, "a", "Status.RestartCount") == "0"
    node.cli("rm", "-f", "a")
    refused = node.cli("run", "--rm", "--restart", "always", image, check=False)
    assert "auto_remove" in refused.stderr


def test_policies_when_the_node_starts(node: Node, image: str) -> None:
    for name, policy in (("a", "always"), ("u", "unless-stopped"), ("f", "on-failure"), ("n", "no")):
        node.cli("run", "-d", "--restart", policy, "--name", name, image, "sleep", "1000")
        node.cli("run", "-d", "--restart", policy, "--name", f"{name}-stopped", image, "sleep", "1000")
        node.cli("stop", "-t", "0", f"{name}-stopped")
    pids = [pid(node, name) for name in "aufn"]
    node.kill()
    node.host.sh(f"kill -9 {' '.join(map(str, pids))}")
    node.start()
    wait_until(lambda: {"a", "u", "f", "a-stopped"} <= set(node.out("ps", "--format", "{{.Name}}").split()))
    assert sorted(node.out("ps", "--format", "{{.Name}}").split()) == ["a", "a-stopped", "f", "u"]
    assert node.out("system", "check") == "kernel and store agree"


def test_the_machine_goes_down(node: Node, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers are asked to end, each in its time; what policies say runs again afterwards."""
    systemctl = node.place / "systemctl"
    systemctl.write_text("#!/bin/sh\necho stopping\n")
    systemctl.chmod(0o755)
    node.stop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, monkeypatch.context() as environment:
        manager.bind(str(node.place / "notify"))
        environment.setenv("NOTIFY_SOCKET", str(node.place / "notify"))
        environment.setenv("PATH", f"{node.place}:{os.environ['PATH']}")
        node.start_resolver()
        node.start()
        listens = "trap 'sleep 1; exit 7' TERM; while :; do sleep 0.1; done"
        for name, policy in (("a", "always"), ("f", "on-failure"), ("n", "no")):
            node.cli(
                "run", "-d", "--restart", policy, "--stop-timeout", "20", "--name", name, image, "sh", "-c", listens
            )
        node.cli("run", "-d", "--stop-timeout", "0", "--name", "deaf", image, "sleep", "1000")
        assert node.daemon
        node.daemon.send_signal(signal.SIGTERM)
        node.daemon.wait(timeout=20 * SLOWER)
        told = [manager.recv(100).decode().partition("=") for _ in range(3)]
    assert [each[0] for each in told] == ["READY", "STOPPING", "EXTEND_TIMEOUT_USEC"]
    assert int(told[2][2]) > 20e6
    node.start()
    wait_until(lambda: sorted(node.out("ps", "--format", "{{.Name}}").split()) == ["a", "f"], what="policies")
    assert (shown(node, "n", "Status.ExitCode"), shown(node, "deaf", "Status.ExitCode")) == ("7", "137")


def test_a_restart_goes_on_when_its_caller_leaves(node: Node, image: str, client: Client) -> None:
    node.cli("run", "-d", "--name", "a", image, "sh", "-c", "trap '' TERM; echo deaf; while true; do sleep 1; done")
    wait_until(lambda: "deaf" in node.out("logs", "a"), what="a container that does not listen")
    first = pid(node, "a")
    request = container_pb2.RestartContainerRequest(container="a", timeout={"seconds": 3})
    with pytest.raises(grpc.RpcError) as left:
        client.containers.RestartContainer(request, timeout=1)
    assert left.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: pid(node, "a") not in (0, first), what="the restart that nobody waits for")


def test_restart_and_prune(node: Node, image: str) -> None:
    """As Docker's: what runs is stopped first, what does not is started; prune leaves what runs."""
    node.cli("run", "-d", "--name", "a", "-p", "8080:80", image)
    node.cli("create", "--name", "b", image)
    node.cli("run", "--name", "ended", image, "true")
    node.cli("run", "-d", "--rm", "--name", "passing", image)
    before = node.out("inspect", "-f", "{{.Status.Pid}}", "a")
    assert node.out("restart", "-t", "0", "a", "b").split() == ["a", "b"]
    assert node.out("inspect", "-f", "{{.Status.Pid}}", "a") != before
    assert node.out("ps", "--filter", "name=^a$", "--format", "{{.Status.State}}") == "running"
    assert "is removed when it ends (--rm)" in node.cli("restart", "-t", "0", "passing", check=False).stderr
    assert "nosuch" in node.cli("restart", "nosuch", check=False).stderr
    assert node.out("rm", "-f", "passing") == "passing"
    assert node.out("container", "prune", "--force").split() == ["ended"]
    assert sorted(node.out("ps", "-a", "--format", "{{.Name}}").split()) == ["a", "b"]
    assert image.split(":")[0] in node.out("images")
    assert "is used by a, b" in node.cli("rmi", image, check=False).stderr
