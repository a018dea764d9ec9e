"""Side by side, in one run: the floor (raw netlink), netstore through gRPC, and dockerd where it is installed.

Runs inside a network and mount namespace of its own; `scripts/bench attach` makes it. Figures are milliseconds.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import uuid
from pathlib import Path

from common import BIN, dockerd, measure, sh, show, start_netstore

from netstore.api.v1 import common_pb2, container_pb2, endpoint_pb2, image_pb2, network_pb2, volume_pb2
from netstore.client import BlockingClient as Client
from netstore.kernel import addressing, netlink
from netstore.kernel.namespaces import socket_inside
from netstore.kernel.route import RouteSocket

COUNT = int(os.environ.get("NETSTORE_BENCH_COUNT", "500"))
ROUNDS = 30


def floor(count: int) -> list[float]:
    """A veth into a namespace, a bridge port, an address and a route: messages encoded beforehand, two sends."""
    route = RouteSocket()
    route.run([netlink.bridge_add("floor", mac="02:00:00:00:00:01"), netlink.link_set("floor", up=True)])
    master = route.index_of("floor") or 0
    outer, inner, descriptors = [], [], []
    for index in range(count):
        sh(f"ip netns add f{index}")
        descriptors.append(os.open(f"/run/netns/f{index}", os.O_RDONLY))
        mac = f"02:00:00:00:{index // 256:02x}:{index % 256:02x}"
        pair = netlink.veth_add(
            f"f{index}", master=master, mtu=1500, peer="eth0", peer_mac=mac, peer_namespace=descriptors[-1]
        )
        outer.append([pair, netlink.link_set(f"f{index}", up=True)])
        inner.append(
            [netlink.link_set(1, up=True), netlink.link_set(2, up=True),
             addressing.address_add(2, f"10.250.{index // 250}.{index % 250 + 2}", 16), addressing.route_replace("10.250.0.1", 2)]
        )  # fmt: skip
    sh("ip addr add 10.250.0.1/16 dev floor")

    def attach(index: int) -> None:
        route.run(outer[index])
        with RouteSocket(socket_inside(descriptors[index], 16, 3)) as inside:
            inside.run(inner[index])

    times = measure(attach, count)
    for index, descriptor in enumerate(descriptors):
        os.close(descriptor)
        sh(f"ip netns del f{index}")
    sh("ip link del floor")
    return times


def attachments(client: Client, floor_p50: float) -> None:
    client.networks.CreateNetwork(network_pb2.CreateNetworkRequest(network={"name": "bench"}))
    for index in range(COUNT):
        sh(f"ip netns add c{index}")
    ids: list[str] = []

    def attach(index: int) -> None:
        spec = {"network": "bench", "sandbox": {"netns_path": f"/run/netns/c{index}"}}
        request = endpoint_pb2.AttachEndpointRequest(endpoint={"spec": spec})
        ids.append(client.endpoints.AttachEndpoint(request).endpoint.id)

    times = measure(attach, COUNT)
    p50 = show("netstore attach (gRPC)", times)
    print(f"{'':<52}{p50 / floor_p50:>9.2f} times the floor (to hold: 5)")
    first, last = statistics.median(times[:30]), statistics.median(times[-30:])
    print(f"{'':<52}{last / first:>9.2f} last 30 of {COUNT} against first 30 (to hold: 1.3)")

    def publish(index: int) -> None:
        port = common_pb2.PortMapping(host_port=20000 + index, container_port=80)
        client.endpoints.PublishPorts(endpoint_pb2.PublishPortsRequest(endpoint=ids[index], ports=[port]))

    show("netstore publish a port (to hold: 2)", measure(publish, 200))

    def detach(index: int) -> None:
        client.endpoints.DetachEndpoint(endpoint_pb2.DetachEndpointRequest(endpoint=ids[index]))

    show("netstore detach", measure(detach, ROUNDS))


def objects(client: Client, place: Path) -> None:
    def network(index: int) -> None:
        client.networks.CreateNetwork(network_pb2.CreateNetworkRequest(network={"name": f"n{index}"}))

    show("netstore network create (to hold: 10)", measure(network, 20))

    def volume(index: int) -> None:
        client.volumes.CreateVolume(volume_pb2.CreateVolumeRequest(volume={"name": f"v{index}"}))

    show("netstore volume create", measure(volume, ROUNDS))
    tar = place / "bb.tar"
    root = place / "root"
    (root / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/sleep")
    sh(f"tar -C {root} -cf {tar} .")
    start = image_pb2.ImageConfig(cmd=["/bin/sleep", "1000"])
    requests = [image_pb2.ImportImageRequest(start={"name": "bb", "config": start})]
    data = tar.read_bytes()
    requests += [image_pb2.ImportImageRequest(chunk=data[at : at + (1 << 19)]) for at in range(0, len(data), 1 << 19)]
    client.images.ImportImage(iter(requests))

    def run(index: int) -> None:
        spec = {
            "image": "bb", "networks": [{"network": "bench"}], "mounts": [{"source": f"data{index}", "target": "/data"}],
            "ports": [{"host_port": 9000 + index, "container_port": 80}],
        }  # fmt: skip
        request = container_pb2.CreateContainerRequest(
            container={"name": f"c{index}", "spec": spec}, request_id=str(uuid.uuid4())
        )
        made = client.containers.CreateContainer(request).container
        client.containers.StartContainer(container_pb2.StartContainerRequest(container=made.id))

    show("netstore create+start, net+port+volume (to hold: 80)", measure(run, ROUNDS))

    def cli(index: int) -> None:
        flags = ["--network", "bench", "-p", f"{9500 + index}:80", "-v", f"more{index}:/data"]
        sh(f"{BIN}/netstore -H {client.address} run -d {' '.join(flags)} bb")

    show("netstore CLI run -d", measure(cli, 10))


def docker(place: Path) -> None:
    """Debian's dockerd, in this private namespace; its own tool drives it, so a process start is in each figure."""
    if not shutil.which("dockerd"):
        print("dockerd is not installed (apt-get install docker.io): not measured")
        return
    try:
        with dockerd(place) as tool:
            sh(f'{tool} import -c \'CMD ["/bin/sleep","1000"]\' {place}/bb.tar bb')
            baseline = show("docker CLI alone (docker version)", measure(lambda _: sh(f"{tool} version"), 5))
            show(
                "docker CLI network create",
                measure(lambda i: sh(f"{tool} network create d{i}"), 5),
                f"{baseline:.0f} of it the CLI",
            )
            show("docker CLI run -d", measure(
                lambda i: sh(f"{tool} run -d --name c{i} --network d0 -p {9700 + i}:80 -v w{i}:/data bb"), 8))  # fmt: skip
            show("docker CLI network connect", measure(lambda i: sh(f"{tool} network connect d1 c{i}"), 8))
            show("docker CLI network disconnect", measure(lambda i: sh(f"{tool} network disconnect d1 c{i}"), 8))
            sh(f"{tool} rm -f $({tool} ps -aq)")
    except subprocess.CalledProcessError as error:
        print(f"dockerd: not measured: {error.stderr.decode().strip()[-300:]}")


def main() -> None:
    place = Path(sys.argv[1])
    print(f"{'ms':<52}{'p50':>9}{'min':>9}{'p95':>9}")
    floor_p50 = show("floor: raw netlink attach", floor(100))
    client = start_netstore(place)
    attachments(client, floor_p50)
    objects(client, place)
    containers = client.containers.ListContainers(
        container_pb2.ListContainersRequest(all=True, page_size=1000)
    ).containers
    for container in containers:
        client.containers.DeleteContainer(
            container_pb2.DeleteContainerRequest(container=container.id, force=True, volumes=True)
        )
    docker(place)


if __name__ == "__main__":
    main()
