"""The API over TCP: mutual TLS, or nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import grpc
from conftest import Node

OPENSSL = """
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=ca -keyout ca.key -out ca.pem
for name in server client; do
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=$name -keyout $name.key -out $name.csr
  printf 'subjectAltName=IP:203.0.113.1' > $name.ext
  openssl x509 -req -in $name.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 1 -extfile $name.ext -out $name.pem
done
cp client.pem cert.pem; cp client.key key.pem
"""


def test_tcp_needs_a_certificate(node: Node, place: Path) -> None:
    subprocess.run(["sh", "-ec", OPENSSL], cwd=place, capture_output=True, check=True)
    node.stop()
    config = place / "netstored.toml"
    config.write_text(
        f'[resolver]\nmanage = false\n[tls]\ncert = "{place}/server.pem"\nkey = "{place}/server.key"\nca = "{place}/ca.pem"\n'
    )
    node.start_resolver()
    node.start("--config", str(config), "--listen", node.address, "--listen", "tcp://203.0.113.1:7070")
    tcp = ("-H", "tcp://203.0.113.1:7070")
    flags = ("--tlscacert", f"{place}/ca.pem", "--tlscert", f"{place}/cert.pem", "--tlskey", f"{place}/key.pem")
    assert "bridge" in node.out(*tcp, *flags, "network", "ls")
    refused = node.cli(*tcp, "network", "ls", check=False)
    assert refused.returncode == 2
    assert "--tlscacert" in refused.stderr
    subprocess.run(["sh", "-ec", OPENSSL.replace("CN=ca", "CN=other")], cwd=place, capture_output=True, check=True)
    stranger = node.cli(*tcp, *flags, "network", "ls", check=False)
    assert stranger.returncode == 3, "certificates of another authority"
    with grpc.insecure_channel("unix:" + node.address.removeprefix("unix://")) as channel:
        grpc.channel_ready_future(channel).result(timeout=5)


def test_tcp_without_certificates_is_refused(node: Node) -> None:
    node.kill()
    done = node.host.run(*node.command("netstored", "--listen", "tcp://127.0.0.1:7070"), check=False)
    assert done.returncode == 1
    assert "needs certificates" in done.stderr
    node.start()
