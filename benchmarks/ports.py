"""Publishing a port with 0, 1,000 and 20,000 published, beside CNI portmap and netavark; and what a port then costs.

Connections a second and bytes a second through 127.0.0.1: without NAT, by netstore (and by its relay of ::1), and by
dockerd's docker-proxy; the same server, in the container's namespace, and the same client for all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import measure, sh, show, start_netstore

from netstore.api.v1 import common_pb2, endpoint_pb2, network_pb2
from netstore.client import BlockingClient as Client

BATCH, ROUNDS, PEER_ROUNDS = 500, 100, 8
CONNECTIONS, SECONDS = 4000, 2.0
PEERS = Path(".peers").absolute()

SERVER = """
import socket, threading
def stream(connection):
    block = bytes(1 << 20)
    try:
        if connection.recv(1) == b"s":
            while True:
                connection.sendall(block)
        connection.close()
    except OSError:
        pass
once, long = (socket.create_server(("", port), backlog=4096) for port in (80, 81))
print(flush=True)
def accept():
    while True:
        threading.Thread(target=stream, args=[long.accept()[0]], daemon=True).start()
threading.Thread(target=accept, daemon=True).start()
while True:
    connection, _ = once.accept()
    connection.send(b"x")
    connection.close()
"""


def netstore(client: Client) -> None:
    """Publish through gRPC, with ever more ports published."""
    endpoints, made = client.endpoints, []
    for index in range(41):  # a row of an endpoint carries its ports: 500 on each
        made.append(attach(client, f"c{index}"))

    def fill(first: int, last: int) -> None:
        for start in range(first, last, BATCH):
            ports = [
                common_pb2.PortMapping(host_port=10000 + n, container_port=80) for n in range(start, start + BATCH)
            ]
            endpoints.PublishPorts(endpoint_pb2.PublishPortsRequest(endpoint=made[start // BATCH], ports=ports))

    figures = []
    for before, there in ((0, 0), (0, 1000), (1000, 20000)):
        fill(before, there)
        offset = 40000 + there // 100
        batch = [common_pb2.PortMapping(host_port=offset + n, container_port=80) for n in range(ROUNDS)]

        def publish(index: int, ports: list[common_pb2.PortMapping] = batch) -> None:
            endpoints.PublishPorts(endpoint_pb2.PublishPortsRequest(endpoint=made[-1], ports=[ports[index]]))

        def unpublish(index: int, ports: list[common_pb2.PortMapping] = batch) -> None:
            endpoints.UnpublishPorts(endpoint_pb2.UnpublishPortsRequest(endpoint=made[-1], ports=[ports[index]]))

        figures.append(show(f"netstore: publish, {there} published (to hold: 2)", measure(publish, ROUNDS)))
        show(f"netstore: unpublish, {there} published", measure(unpublish, ROUNDS))
    print(f"{'':<52}{figures[2] / figures[0]:>9.2f} with 20,000 against with none")


def attach(client: Client, name: str, ports: tuple[tuple[int, int], ...] = ()) -> str:
    """Attach a new namespace, with published ports, and return its endpoint's id."""
    sh(f"ip netns add {name}")
    wanted = [{"host_port": outer, "container_port": inner} for outer, inner in ports]
    spec = {"network": "bench", "sandbox": {"netns_path": f"/run/netns/{name}"}, "ports": wanted}
    return client.endpoints.AttachEndpoint(endpoint_pb2.AttachEndpointRequest(endpoint={"spec": spec})).endpoint.id


def portmap() -> None:
    """CNI portmap: one process and some iptables a container; the bridge is made beforehand."""
    plugin = PEERS / "usr/lib/cni/portmap"
    sh("ip netns add cni")

    def add(name: str, ports: list[int]) -> None:
        mappings = [{"hostPort": port, "containerPort": 80, "protocol": "tcp"} for port in ports]
        result = {"cniVersion": "0.4.0", "interfaces": [{"name": "eth0", "sandbox": "/run/netns/cni"}],
                  "ips": [{"version": "4", "interface": 0, "address": "10.201.0.2/16", "gateway": "10.201.0.1"}]}  # fmt: skip
        config = {"cniVersion": "0.4.0", "name": "bench", "type": "portmap", "snat": True,
                  "runtimeConfig": {"portMappings": mappings}, "prevResult": result}  # fmt: skip
        variables = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": name, "CNI_NETNS": "/run/netns/cni", "CNI_IFNAME": "eth0",
                     "CNI_PATH": str(plugin.parent), "PATH": os.environ["PATH"]}  # fmt: skip
        done = subprocess.run([plugin], input=json.dumps(config), text=True, env=variables, capture_output=True)
        if done.returncode:
            raise RuntimeError(done.stdout)

    there = 0
    for more in (0, 1000):
        for start in range(0, more, 100):
            add(f"seed{start}", list(range(20000 + start, 20100 + start)))
        there += more
        show(f"CNI portmap: publish, {there} published",
             measure(lambda i, base=30000 + there: add(f"c{base + i}", [base + i]), PEER_ROUNDS))  # fmt: skip


def netavark() -> None:
    """Netavark: a bridge, a veth and the port are one call; without a port it is the veth's part."""
    program = PEERS / "usr/lib/podman/netavark"

    def setup(index: int, ports: list[int]) -> None:
        sh(f"ip netns add n{index}")
        network = {"name": "bench", "id": "b" * 64, "driver": "bridge", "network_interface": "podman9",
                   "subnets": [{"subnet": "10.200.0.0/16", "gateway": "10.200.0.1"}], "ipv6_enabled": False,
                   "internal": False, "dns_enabled": False, "ipam_options": {"driver": "host-local"}}  # fmt: skip
        mappings = [
            {"host_ip": "", "container_port": 80, "host_port": port, "range": 1, "protocol": "tcp"} for port in ports
        ]
        address = f"10.200.{index // 200 + 1}.{index % 200 + 2}"
        config = {"container_id": f"{index:064x}", "container_name": f"n{index}", "port_mappings": mappings,
                  "networks": {"bench": {"static_ips": [address], "interface_name": "eth0"}},
                  "network_info": {"bench": network}}  # fmt: skip
        command = [program, "--config", f"{sys.argv[1]}/netavark", "setup", f"/run/netns/n{index}"]
        done = subprocess.run(command, input=json.dumps(config), text=True, capture_output=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)

    setup(0, [])
    show("netavark: setup without a port", measure(lambda i: setup(10 + i, []), PEER_ROUNDS))
    show("netavark: setup and publish, 0 published", measure(lambda i: setup(30 + i, [30000 + i]), PEER_ROUNDS))
    for start in range(0, 1000, 100):
        setup(100 + start, list(range(20000 + start, 20100 + start)))
    show("netavark: setup and publish, 1000 published", measure(lambda i: setup(50 + i, [31000 + i]), PEER_ROUNDS))


@contextmanager
def served(*inside: str) -> Iterator[None]:
    """Run the server in a namespace."""
    server = subprocess.Popen([*inside, sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
    assert server.stdout
    server.stdout.readline()
    try:
        yield
    finally:
        server.kill()
        server.wait()


def through(name: str, address: str, once: int, long: int) -> None:
    """Print connections and gigabytes a second through an address."""
    code = f"""
import socket, struct, time
family = socket.AF_INET6 if ":" in {address!r} else socket.AF_INET
started = time.perf_counter()
for _ in range({CONNECTIONS}):
    with socket.socket(family) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        s.connect(({address!r}, {once}))
        assert s.recv(1) == b"x"
print({CONNECTIONS} / (time.perf_counter() - started))
with socket.create_connection(({address!r}, {long})) as s:
    s.send(b"s")
    buffer, total, started = bytearray(1 << 20), 0, time.perf_counter()
    while time.perf_counter() - started < {SECONDS}:
        total += s.recv_into(buffer)
print(total / (time.perf_counter() - started) / 1e9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        print(f"{name:<52} not measured: {done.stderr.strip()[-200:]}")
        return
    rate, volume = map(float, done.stdout.split())
    print(f"{name:<52}{rate:>14.0f}{volume:>9.2f}", flush=True)


def docker_proxy(place: Path) -> None:
    """dockerd with its userland proxy, which is what answers on 127.0.0.1."""
    path = f"{PEERS}/usr/sbin:{PEERS}/usr/bin:{os.environ['PATH']}"
    tool = ["env", f"PATH={path}", "docker", "-H", f"unix://{place}/docker.sock"]
    daemon = subprocess.Popen(
        ["env", f"PATH={path}", "dockerd", "-H", f"unix://{place}/docker.sock", "--data-root", f"{place}/docker",
         "--exec-root", f"{place}/docker-run", "--pidfile", f"{place}/docker.pid", "--storage-driver", "vfs",
         "--userland-proxy-path", f"{PEERS}/usr/sbin/docker-proxy"], stderr=(place / "dockerd.log").open("w"),
    )  # fmt: skip
    try:
        for _ in range(100):
            if subprocess.run([*tool, "version"], capture_output=True).returncode == 0:
                break
            time.sleep(0.2)
        root = place / "root/bin"
        root.mkdir(parents=True)
        sh(f"cp /bin/busybox {root}/sleep; tar -C {place}/root -cf {place}/bb.tar .")
        sh(f"{' '.join(tool)} import {place}/bb.tar bb")
        sh(f"{' '.join(tool)} run -d --name web -p 7080:80 -p 7081:81 bb /bin/sleep 1000")
        pid = subprocess.run(
            [*tool, "inspect", "-f", "{{.State.Pid}}", "web"], capture_output=True, text=True
        ).stdout.strip()
        with served("nsenter", f"--net=/proc/{pid}/ns/net"):
            through("dockerd: 127.0.0.1, docker-proxy", "127.0.0.1", 7080, 7081)
            through("dockerd: the host's address, its NAT", "203.0.113.1", 7080, 7081)
        subprocess.run([*tool, "rm", "-f", "web"], capture_output=True)
    finally:
        daemon.terminate()
        daemon.wait(timeout=30)


def main() -> None:
    """Print the tables."""
    place = Path(sys.argv[1])
    client = start_netstore(place)
    client.networks.CreateNetwork(network_pb2.CreateNetworkRequest(network={"name": "bench"}))
    print(f"{'ms':<52}{'p50':>9}{'min':>9}{'p95':>9}")
    netstore(client)
    for peer in (portmap, netavark):
        try:
            peer()
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            print(f"{peer.__name__}: not measured: {str(error)[-200:]}")
        sh(
            "for t in nat filter mangle; do iptables -t $t -F; iptables -t $t -X; done"
        )  # the next begins without their rules
    print(f"\n{'':<52}{'connections/s':>14}{'GB/s':>9}")
    server = attach(client, "server", ((8080, 80), (8081, 81)))
    address = client.endpoints.GetEndpoint(endpoint_pb2.GetEndpointRequest(endpoint=server)).endpoint.status.addresses[
        0
    ]
    with served():
        through("no container: the host's loopback", "127.0.0.1", 80, 81)
    with served("ip", "netns", "exec", "server"):
        through("no NAT: the container's own address", address.split("/")[0], 80, 81)
        through("netstore: 127.0.0.1", "127.0.0.1", 8080, 8081)
        through("netstore: the host's address", "203.0.113.1", 8080, 8081)
        through("netstore: [::1], the relay", "::1", 8080, 8081)
    docker_proxy(place)


main()
