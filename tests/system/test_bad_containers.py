"""Every field of every request about containers and images, with a bad value; damaged archives."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from bad_input import INVALID, MISSING, PRECONDITION, port, refused
from conftest import Node

from netstore.api.v1 import container_pb2, image_pb2, mount_pb2
from netstore.client import BlockingClient as Client

BIND, TMPFS, IMAGE = mount_pb2.MOUNT_TYPE_BIND, mount_pb2.MOUNT_TYPE_TMPFS, mount_pb2.MOUNT_TYPE_IMAGE


def container(name: str = "c", **spec):
    spec = container_pb2.ContainerSpec(**{"image": "bb", **spec})
    return container_pb2.CreateContainerRequest(container=container_pb2.Container(name=name, spec=spec))


def mount(**fields):
    return container(mounts=[mount_pb2.MountSpec(**{"target": "/t", **fields})])


def joining(**fields):
    return container(networks=[container_pb2.NetworkAttachment(**{"network": "bridge", **fields})])


CONTAINERS = [
    ("CreateContainer", container("a/b"), INVALID, "name"),
    ("CreateContainer", container(image=""), INVALID, "spec.image"),
    ("CreateContainer", container(image="nosuch"), MISSING, "nosuch"),
    ("CreateContainer", container(entrypoint=["x"]), INVALID, "spec.override_entrypoint"),
    ("CreateContainer", container(env=["=x"]), INVALID, "spec.env[0]"),
    ("CreateContainer", container(working_dir="../x"), INVALID, "spec.working_dir"),
    ("CreateContainer", container(user="nobodyatall"), INVALID, "user"),
    ("CreateContainer", container(hostname="a_b"), INVALID, "spec.hostname"),
    ("CreateContainer", container(stop_signal="SIGNO"), INVALID, "signal"),
    ("CreateContainer", container(stop_timeout={"seconds": -1}), INVALID, "spec.stop_timeout"),
    ("CreateContainer", container(restart_policy={"mode": 99}), INVALID, "spec.restart_policy.mode"),
    ("CreateContainer", container(restart_policy={"mode": 3}, auto_remove=True), INVALID, "spec.restart_policy.mode"),
    ("CreateContainer", container(restart_policy={"max_retries": 1}), INVALID, "spec.restart_policy.max_retries"),
    ("CreateContainer", container(restart_policy={"mode": 2, "max_retries": -1}), INVALID, "spec.restart_policy.max_retries"),
    ("CreateContainer", container(sandbox_container="nosuch"), MISSING, "nosuch"),
    ("CreateContainer", container(ports=port(container_port=0)), INVALID, "spec.ports[0]"),
    ("CreateContainer", joining(network="nosuch"), MISSING, "nosuch"),
    ("CreateContainer", joining(link_local_addresses=["::1"]), INVALID, "spec.networks[0].link_local_addresses[0]"),
    ("CreateContainer", joining(aliases=["x"]), INVALID, "spec.networks[0].aliases"),
    ("CreateContainer", joining(ipv4_address="172.17.0.9"), INVALID, "spec.networks[0].ipv4_address"),
    ("CreateContainer", joining(ipv6_address="172.17.0.9"), INVALID, "spec.networks[0].ipv6_address"),
    ("CreateContainer", joining(options={"x": "y"}), INVALID, "spec.networks[0].options"),
    ("CreateContainer", joining(mac_address="zz"), INVALID, "spec.networks[0].mac_address"),
    ("CreateContainer", joining(network="host", mac_address="02:00:00:00:00:01"), INVALID, "spec.networks[0].mac_address"),
    ("CreateContainer", container(networks=[{"network": "host"}, {"network": "bridge"}]), INVALID, "spec.networks"),
    ("CreateContainer", container(networks=[{"network": "host", "links": ["a"]}]), INVALID, "spec.networks[0].links"),
    ("CreateContainer", container(networks=[{"network": "bridge", "links": [":a"]}]), INVALID, "spec.networks[0].links[0]"),
    ("CreateContainer", container(networks=[{"network": "bridge", "links": ["nosuch:a"]}]), MISSING, "nosuch"),
    ("CreateContainer", container(networks=[{"network": "bridge"}, {"network": "bridge"}]), INVALID, "spec.networks"),
    ("CreateContainer", mount(target="relative"), INVALID, "spec.mounts[0].target"),
    ("CreateContainer", mount(target="/"), INVALID, "spec.mounts[0].target"),
    ("CreateContainer", mount(target="/a/../b"), INVALID, "spec.mounts[0].target"),
    ("CreateContainer", mount(source="../v"), INVALID, "spec.mounts[0].source"),
    ("CreateContainer", mount(volume_driver="nosuch", source="v"), INVALID, "spec.driver"),
    ("CreateContainer", mount(type=BIND, source="relative"), INVALID, "spec.mounts[0].source"),
    ("CreateContainer", mount(type=BIND, source="/nosuch/dir"), PRECONDITION, "/nosuch/dir"),
    ("CreateContainer", mount(type=BIND, source="/tmp", propagation="x"), INVALID, "spec.mounts[0].propagation"),
    ("CreateContainer", mount(type=BIND, source="/tmp", no_copy=True), INVALID, "spec.mounts[0].no_copy"),
    ("CreateContainer", mount(type=TMPFS, source="x"), INVALID, "spec.mounts[0].source"),
    ("CreateContainer", mount(type=TMPFS, tmpfs_mode=0o70000), INVALID, "spec.mounts[0].tmpfs_mode"),
    ("CreateContainer", mount(type=TMPFS, tmpfs_size_bytes=-1), INVALID, "spec.mounts[0].tmpfs_size_bytes"),
    ("CreateContainer", mount(type=TMPFS, tmpfs_options=["evil=1,exec"]), INVALID, "spec.mounts[0].tmpfs_options"),
    ("CreateContainer", mount(source="v", subpath="/abs"), INVALID, "spec.mounts[0].subpath"),
    ("CreateContainer", mount(source="v", subpath="a/../../b"), INVALID, "spec.mounts[0].subpath"),
    ("CreateContainer", mount(subpath="a"), INVALID, "anonymous"),
    ("CreateContainer", mount(type=BIND, source="/tmp", subpath="a"), INVALID, "spec.mounts[0].subpath"),
    ("CreateContainer", mount(source="v", recursive="enabled"), INVALID, "spec.mounts[0].recursive"),
    ("CreateContainer", mount(type=BIND, source="/tmp", recursive="maybe"), INVALID, "spec.mounts[0].recursive"),
    ("CreateContainer", mount(type=BIND, source="/tmp", recursive="writable"), INVALID, "read_only"),
    ("CreateContainer", mount(type=BIND, source="/tmp", recursive="readonly", read_only=True, propagation="rslave"), INVALID, "rprivate"),
    ("CreateContainer", mount(type=TMPFS, no_exec=True), INVALID, "spec.mounts[0].no_exec"),
    ("CreateContainer", mount(type=TMPFS, no_suid=True), INVALID, "spec.mounts[0].no_suid"),
    ("CreateContainer", mount(type=TMPFS, no_dev=True), INVALID, "spec.mounts[0].no_dev"),
    ("CreateContainer", mount(source="v", uid_mappings=[{"stored_id": 0, "mount_id": 1}]), INVALID, "spec.mounts[0].uid_mappings[0]"),
    ("CreateContainer", mount(source="v", gid_mappings=[{"mount_id": 2**32 - 1, "count": 2}]), INVALID, "spec.mounts[0].gid_mappings[0]"),
    ("CreateContainer", mount(source="v", uid_mappings=[{"count": 1}] * 341), INVALID, "340"),
    ("CreateContainer", mount(type=IMAGE, source="bb", uid_mappings=[{"count": 1}]), INVALID, "spec.mounts[0].uid_mappings"),
    ("CreateContainer", mount(source="v", chown=True, read_only=True), INVALID, "spec.mounts[0].chown"),
    ("CreateContainer", mount(type=IMAGE), INVALID, "spec.mounts[0].source"),
    ("CreateContainer", mount(type=IMAGE, source="nosuch"), MISSING, "nosuch"),
    ("CreateContainer", mount(type=77), INVALID, "spec.mounts[0].type"),
    ("CreateContainer", container(volumes_from=["nosuch"]), MISSING, "nosuch"),
    ("CreateContainer", container(volumes_from=["c:rx"]), INVALID, "spec.volumes_from[0]"),
    ("CreateContainer", container(volumes_from=[""]), INVALID, "spec.volumes_from[0]"),
    ("CreateContainer", container(volumes_from=["c"] * 65), INVALID, "spec.volumes_from"),
    ("CreateContainer", container(mounts=[{"target": "/t"}, {"target": "/t/"}]), INVALID, "spec.mounts[1].target"),
    ("GetContainer", container_pb2.GetContainerRequest(), INVALID, "container"),
    ("StartContainer", container_pb2.StartContainerRequest(container="nosuch"), MISSING, "nosuch"),
    ("StopContainer", container_pb2.StopContainerRequest(container="nosuch", signal="x"), INVALID, "signal"),
    ("StopContainer", container_pb2.StopContainerRequest(container="nosuch", timeout={"seconds": -1}), INVALID, "timeout"),
    ("RestartContainer", container_pb2.RestartContainerRequest(container="nosuch", signal="x"), INVALID, "signal"),
    ("RestartContainer", container_pb2.RestartContainerRequest(container="nosuch"), MISSING, "nosuch"),
    ("KillContainer", container_pb2.KillContainerRequest(container="nosuch", signal="99"), INVALID, "signal"),
    ("KillContainer", container_pb2.KillContainerRequest(container="nosuch"), MISSING, "nosuch"),
    ("DeleteContainer", container_pb2.DeleteContainerRequest(container="nosuch"), MISSING, "nosuch"),
    ("WaitContainer", container_pb2.WaitContainerRequest(container="nosuch"), MISSING, "nosuch"),
    ("ListContainers", container_pb2.ListContainersRequest(filter=["status=sad"]), INVALID, "status"),
    ("ReadLogs", container_pb2.ReadLogsRequest(container="nosuch"), MISSING, "nosuch"),
    ("ReadLogs", container_pb2.ReadLogsRequest(container="nosuch", tail=-1), INVALID, "tail"),
    ("ExecContainer", [], INVALID, "start"),
    ("ExecContainer", [container_pb2.ExecContainerRequest(stdin=b"x")], INVALID, "start"),
    ("ExecContainer", [container_pb2.ExecContainerRequest(start={"container": "c"})], INVALID, "command"),
    ("ExecContainer", [container_pb2.ExecContainerRequest(start={"container": "nosuch", "command": ["x"]})], MISSING, "nosuch"),
    ("ExecContainer", [container_pb2.ExecContainerRequest(start={"container": "c", "command": ["x"], "tty": True, "size": {"rows": 70000, "columns": 80}})], INVALID, "size"),
    ("ExecContainer", [container_pb2.ExecContainerRequest(start={"container": "c", "command": ["x"], "size": {"rows": 24, "columns": 80}})], INVALID, "size"),
    ("AttachContainer", [], INVALID, "start"),
    ("AttachContainer", [container_pb2.AttachContainerRequest(start={"container": "nosuch"})], MISSING, "nosuch"),
    ("AttachContainer", [container_pb2.AttachContainerRequest(start={"container": "nosuch", "size": {"rows": 24}})], INVALID, "size"),
]  # fmt: skip

IMAGES = [
    ("GetImage", image_pb2.GetImageRequest(image="nosuch"), MISSING, "nosuch"),
    ("DeleteImage", image_pb2.DeleteImageRequest(image="nosuch"), MISSING, "nosuch"),
    ("ListImages", image_pb2.ListImagesRequest(filter=["a"]), INVALID, "filter"),
    ("PullImage", image_pb2.PullImageRequest(), INVALID, "image"),
    ("PullImage", image_pb2.PullImageRequest(image="UPPER"), INVALID, "image"),
    ("PullImage", image_pb2.PullImageRequest(image="x", password="p"), INVALID, "username"),
    ("ImportImage", [], INVALID, "start"),
    ("ImportImage", [image_pb2.ImportImageRequest(start={"name": "UPPER"})], INVALID, "name"),
    ("ImportImage", [image_pb2.ImportImageRequest(start={"name": "x", "format": 9})], INVALID, "format"),
    ("ImportImage", [image_pb2.ImportImageRequest(start={"name": "x", "config": {"working_dir": "x"}})], INVALID, "config.working_dir"),
    ("ImportImage", [image_pb2.ImportImageRequest(start={"name": "x"}), image_pb2.ImportImageRequest(chunk=b"x" * 700)], INVALID, "archive"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("service", "table"),
    [("containers", CONTAINERS), ("images", IMAGES)],
)  # fmt: skip
def test_bad_values_are_named_and_change_nothing(
    node: Node, client: Client, image: str, service: str, table: list
) -> None:
    refused(node, client, service, table)


def test_damaged_and_hostile_archives_leave_nothing(node: Node, client: Client, busybox_tar: Path) -> None:
    whole = busybox_tar.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"\x1f\x8b" + whole[:100]):
        requests = [
            image_pb2.ImportImageRequest(start={"name": "x"}),
            image_pb2.ImportImageRequest(chunk=data[: 1 << 20]),
        ]
        with pytest.raises(grpc.RpcError) as caught:
            client.images.ImportImage(iter(requests))
        assert caught.value.code() is INVALID
    assert list((node.place / "state/images/layers").iterdir()) == []
    assert list((node.place / "state/images/tmp").iterdir()) == []


def test_health_and_reflection(client: Client) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    health = health_pb2_grpc.HealthStub(client.channel)
    request = health_pb2.HealthCheckRequest(service="netstore.v1.NetworkService")
    assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    answer = next(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")])))
    names = {service.name for service in answer.list_services_response.service}
    assert {
        f"netstore.v1.{name}Service"
        for name in ("Network", "Endpoint", "Policy", "Volume", "Mount", "Container", "Image", "System")
    } <= names
