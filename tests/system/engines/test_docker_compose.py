"""Debian's docker-compose with dockerd, whose networks, addresses and volumes are netstore's."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Node, wait_until
from dockerd import NEEDS_COMPOSE, NEEDS_DOCKERD, Docker
from test_docker import HELLO, docker, fetch, plugged

__all__ = ["docker", "plugged"]  # fixtures

pytestmark = [NEEDS_DOCKERD, NEEDS_COMPOSE]

FILE = """
version: "3.7"
services:
  web:
    image: bb
    command: ["httpd", "-f", "-p", "80", "-h", "/data"]
    ports: ["8080:80"]
    networks:
      app: {aliases: [www], ipv4_address: 10.9.0.40}
      back: {}
    volumes: ["files:/data/files"]
  worker:
    image: bb
    command: ["sleep", "1000"]
    depends_on: [web]
    networks: [app]
    volumes: ["files:/files:ro"]
  inner:
    image: bb
    command: ["sleep", "1000"]
    networks: [back]
networks:
  app:
    driver: netstore
    driver_opts: {com.docker.network.driver.mtu: "1400"}
    ipam: {driver: netstore, config: [{subnet: 10.9.0.0/24}]}
  back:
    driver: netstore
    internal: true
    ipam: {driver: netstore}
volumes:
  files:
    driver: netstore
    driver_opts: {driver: image, size: 64M}
"""


@pytest.mark.timeout(500)
def test_up_and_down_twice(plugged: Node, docker: Docker, place: Path) -> None:
    """Services find each other by name and share a volume; down takes everything away, but volumes only with -v."""
    project = place / "shop"
    project.mkdir()
    (project / "docker-compose.yml").write_text(FILE)
    for last in (False, True):
        docker.compose(project, "up", "-d")
        wait_until(lambda: fetch(plugged.host, 8080) == HELLO, what="the published port")
        for name in ("web", "www"):
            assert docker.compose(project, "exec", "-T", "worker", "wget", "-qO-", f"http://{name}/hello") == HELLO
        assert docker.compose(project, "exec", "-T", "inner", "wget", "-qO-", "http://web/hello") == HELLO
        if last:
            assert docker.compose(project, "exec", "-T", "worker", "cat", "/files/file") == "kept"
        docker.compose(project, "exec", "-T", "web", "sh", "-c", "echo kept > /data/files/file")
        docker.compose(project, "restart", "-t", "0", "web")
        wait_until(lambda: fetch(plugged.host, 8080) == HELLO, what="the published port, after a restart")
        assert len(plugged.out("endpoint", "ls", "-q").split()) == 4
        assert "mtu 1400" in docker.compose(project, "exec", "-T", "worker", "ip", "link", "show", "eth0")
        docker.compose(project, "up", "-d", "--scale", "worker=3", "-t", "0")
        assert len(plugged.out("endpoint", "ls", "-q").split()) == 6
        docker.compose(project, "down", "-t", "0", *(["-v"] if last else []))
        assert plugged.out("endpoint", "ls", "-q") == ""
        assert plugged.out("network", "ls", "-q", "--filter", "type=custom") == ""
        assert plugged.out("volume", "ls", "-q") == ("" if last else "shop_files")
    assert plugged.out("system", "check") == "kernel and store agree"
