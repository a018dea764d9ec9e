"""netstore-csi, called as an orchestrator's agents call it: the order of the specification, its errors, its repeats."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import BIN, SLOWER, Node, wait_until

from netstore.adapters.csi.pb import csi_pb2 as csi
from netstore.adapters.csi.pb import csi_pb2_grpc

Mode = csi.VolumeCapability.AccessMode
MIB = 1 << 20
GIB = 1 << 30


def mounted(mode: int = Mode.SINGLE_NODE_MULTI_WRITER, fs: str = "", flags: tuple[str, ...] = ()) -> Any:
    mount = csi.VolumeCapability.MountVolume(fs_type=fs, mount_flags=flags)
    return csi.VolumeCapability(mount=mount, access_mode=Mode(mode=mode))


def device(mode: int = Mode.SINGLE_NODE_WRITER) -> Any:
    return csi.VolumeCapability(block=csi.VolumeCapability.BlockVolume(), access_mode=Mode(mode=mode))


@dataclass
class Csi:
    node: Node
    process: subprocess.Popen[bytes]
    channel: grpc.Channel
    controller: csi_pb2_grpc.ControllerStub
    agent: csi_pb2_grpc.NodeStub
    identity: csi_pb2_grpc.IdentityStub
    here: Path

    def make(self, name: str, capability: Any = None, size: int = 64 * MIB, **fields: Any) -> csi.Volume:
        request = csi.CreateVolumeRequest(
            name=name, volume_capabilities=[capability or mounted(fs="ext4")],
            capacity_range=csi.CapacityRange(required_bytes=size), **fields,
        )  # fmt: skip
        return self.controller.CreateVolume(request).volume

    def path(self, name: str) -> str:
        return str(self.here / name)

    def stage(self, volume: str, capability: Any) -> None:
        self.agent.NodeStageVolume(
            csi.NodeStageVolumeRequest(
                volume_id=volume, staging_target_path=self.path("staged"), volume_capability=capability
            )
        )

    def publish(self, volume: str, capability: Any, target: str = "target", *, readonly: bool = False) -> None:
        self.agent.NodePublishVolume(
            csi.NodePublishVolumeRequest(
                volume_id=volume, staging_target_path=self.path("staged"), target_path=self.path(target),
                volume_capability=capability, readonly=readonly,
            )
        )  # fmt: skip

    def unpublish(self, volume: str, target: str = "target") -> None:
        self.agent.NodeUnpublishVolume(csi.NodeUnpublishVolumeRequest(volume_id=volume, target_path=self.path(target)))

    def unstage(self, volume: str) -> None:
        path = self.path("staged")
        self.agent.NodeUnstageVolume(csi.NodeUnstageVolumeRequest(volume_id=volume, staging_target_path=path))

    def delete(self, volume: str) -> None:
        self.controller.DeleteVolume(csi.DeleteVolumeRequest(volume_id=volume))

    def start(self) -> None:
        self.process = start(self.node, self.here)


def start(node: Node, here: Path) -> subprocess.Popen[bytes]:
    command = [str(BIN / "netstore-csi"), "--endpoint", f"unix://{here}/csi.sock", "--host", node.address]
    with (here / "csi.log").open("ab") as log:
        return subprocess.Popen(node.host.command(*command), stdout=log, stderr=log)


@pytest.fixture
def plugin(node: Node, place: Path) -> Iterator[Csi]:
    here = place / "kubelet"
    here.mkdir()
    process = start(node, here)
    with grpc.insecure_channel(f"unix:{here}/csi.sock") as channel:
        grpc.channel_ready_future(channel).result(timeout=20 * SLOWER)
        stubs = csi_pb2_grpc.ControllerStub(channel), csi_pb2_grpc.NodeStub(channel), csi_pb2_grpc.IdentityStub(channel)
        plugin = Csi(node, process, channel, *stubs, here)
        yield plugin
    plugin.process.send_signal(signal.SIGTERM)
    plugin.process.wait(timeout=20)


def refused(code: str, says: str = "") -> Any:
    return pytest.raises(grpc.RpcError, check=lambda e: e.code().name == code and says in e.details())


def test_identity_and_capabilities(plugin: Csi) -> None:
    assert plugin.identity.GetPluginInfo(csi.GetPluginInfoRequest()).name == "netstore.csi"
    assert plugin.identity.Probe(csi.ProbeRequest()).ready.value
    assert len(plugin.identity.GetPluginCapabilities(csi.GetPluginCapabilitiesRequest()).capabilities) == 3
    info = plugin.agent.NodeGetInfo(csi.NodeGetInfoRequest())
    assert info.accessible_topology.segments["netstore.node"] == info.node_id
    plugin.node.kill()
    assert not plugin.identity.Probe(csi.ProbeRequest()).ready.value
    with refused("UNAVAILABLE"):
        plugin.make("pvc-1")
    plugin.node.start()
    assert plugin.identity.Probe(csi.ProbeRequest()).ready.value


def test_a_volume_from_create_to_delete(plugin: Csi) -> None:
    capability = mounted(fs="ext4", flags=("nosuid",))
    volume = plugin.make("pvc-1", capability, parameters={"csi.storage.k8s.io/pvc/name": "data"}).volume_id
    assert plugin.make("pvc-1", capability, parameters={"csi.storage.k8s.io/pvc/name": "data"}).volume_id == volume
    assert plugin.node.out("volume", "ls", "-q", "--filter", "label=csi.storage.k8s.io/pvc/name=data") == "pvc-1"
    with refused("FAILED_PRECONDITION", "NodeStageVolume"):
        plugin.publish(volume, capability)
    for _ in range(2):
        plugin.stage(volume, capability)
        plugin.publish(volume, capability)
    host = plugin.node.host
    host.sh(f"echo kept > {plugin.path('target')}/file")
    plugin.publish(volume, capability, "second", readonly=True)
    assert host.sh(f"cat {plugin.path('second')}/file") == "kept\n"
    assert host.run("touch", f"{plugin.path('second')}/other", check=False).returncode
    with refused("ALREADY_EXISTS", "writable"):
        plugin.publish(volume, capability, readonly=True)
    with refused("FAILED_PRECONDITION", "only writer"):
        plugin.publish(volume, mounted(Mode.SINGLE_NODE_SINGLE_WRITER), "third")
    assert "nosuid" in host.sh(f"findmnt -no OPTIONS {plugin.path('target')}")
    full = host.sh(f"head -c 100M /dev/zero > {plugin.path('target')}/big; rm {plugin.path('target')}/big", check=False)
    assert not full, "what is written past the size fails"
    with refused("FAILED_PRECONDITION"):
        plugin.delete(volume)
    for target in ("target", "target", "second"):
        plugin.unpublish(volume, target)
    for _ in range(2):
        plugin.unstage(volume)
    assert not (plugin.here / "target").exists()
    for _ in range(2):
        plugin.delete(volume)
    assert not plugin.node.out("volume", "ls", "-q")


def test_it_grows_while_it_is_used_and_tells_its_use(plugin: Csi) -> None:
    capability = mounted(fs="xfs")
    volume = plugin.make("grows", capability, 512 * MIB).volume_id
    plugin.stage(volume, capability)
    plugin.publish(volume, capability)
    request = csi.NodeGetVolumeStatsRequest(volume_id=volume, volume_path=plugin.path("target"))
    before = plugin.agent.NodeGetVolumeStats(request)
    assert {each.unit for each in before.usage} == {csi.VolumeUsage.BYTES, csi.VolumeUsage.INODES}
    assert not before.volume_condition.abnormal
    grown = plugin.controller.ControllerExpandVolume(
        csi.ControllerExpandVolumeRequest(volume_id=volume, capacity_range=csi.CapacityRange(required_bytes=GIB))
    )
    assert (grown.capacity_bytes, grown.node_expansion_required) == (GIB, False)
    assert plugin.agent.NodeGetVolumeStats(request).usage[0].total > before.usage[0].total + 400 * MIB
    with refused("NOT_FOUND", "neither staged nor published"):
        elsewhere = csi.NodeGetVolumeStatsRequest(volume_id=volume, volume_path="/elsewhere")
        plugin.agent.NodeGetVolumeStats(elsewhere)
    plugin.unpublish(volume)
    plugin.unstage(volume)
    plugin.delete(volume)


def test_snapshots_and_copies(plugin: Csi) -> None:
    capability = mounted(fs="ext4")
    volume = plugin.make("origin", capability).volume_id
    plugin.stage(volume, capability)
    plugin.node.host.sh(f"echo old > {plugin.path('staged')}/file; sync")
    taken = [
        plugin.controller.CreateSnapshot(csi.CreateSnapshotRequest(source_volume_id=volume, name="snap ☃")).snapshot
        for _ in range(2)
    ]
    assert taken[0] == taken[1]
    assert taken[0].ready_to_use
    assert (taken[0].size_bytes, taken[0].source_volume_id) == (64 * MIB, volume)
    other = plugin.make("other", capability).volume_id
    with refused("ALREADY_EXISTS"):
        plugin.controller.CreateSnapshot(csi.CreateSnapshotRequest(source_volume_id=other, name="snap ☃"))
    plugin.node.host.sh(f"echo new > {plugin.path('staged')}/file; sync")
    plugin.unstage(volume)
    of_snapshot = csi.VolumeContentSource(
        snapshot=csi.VolumeContentSource.SnapshotSource(snapshot_id=taken[0].snapshot_id)
    )
    of_volume = csi.VolumeContentSource(volume=csi.VolumeContentSource.VolumeSource(volume_id=volume))
    for source, name, holds, size in ((of_snapshot, "restored", "old", 128 * MIB), (of_volume, "cloned", "new", 0)):
        copy = plugin.make(name, capability, size, volume_content_source=source)
        assert copy == plugin.make(name, capability, size, volume_content_source=source)
        assert (copy.content_source, copy.capacity_bytes) == (source, size or 64 * MIB)
        plugin.stage(copy.volume_id, capability)
        assert plugin.node.host.sh(f"cat {plugin.path('staged')}/file") == f"{holds}\n"
        plugin.unstage(copy.volume_id)
        with refused("ALREADY_EXISTS", "source"):
            plugin.make(name, capability, size)
    with refused("FAILED_PRECONDITION", "delete its snapshots first"):
        plugin.delete(volume)
    listed = plugin.controller.ListSnapshots(csi.ListSnapshotsRequest(source_volume_id=volume))
    assert [each.snapshot for each in listed.entries] == [taken[0]]
    one = plugin.controller.ListSnapshots(csi.ListSnapshotsRequest(snapshot_id=taken[0].snapshot_id))
    assert [each.snapshot for each in one.entries] == [taken[0]]
    assert not plugin.controller.ListSnapshots(csi.ListSnapshotsRequest(snapshot_id="nothing")).entries
    for _ in range(2):
        plugin.controller.DeleteSnapshot(csi.DeleteSnapshotRequest(snapshot_id=taken[0].snapshot_id))
    plugin.delete(volume)


def test_a_device(plugin: Csi) -> None:
    volume = plugin.make("raw", device(), 32 * MIB).volume_id
    plugin.stage(volume, device())
    plugin.publish(volume, device())
    assert plugin.node.host.sh(f"blockdev --getsize64 {plugin.path('target')}") == f"{32 * MIB}\n"
    with refused("FAILED_PRECONDITION", "device"):
        plugin.stage(volume, mounted())
    with refused("FAILED_PRECONDITION", "only writer"):
        plugin.publish(volume, device(), "second")
    stats = csi.NodeGetVolumeStatsRequest(volume_id=volume, volume_path=plugin.path("target"))
    assert plugin.agent.NodeGetVolumeStats(stats).usage[0].total == 32 * MIB
    plugin.unpublish(volume)
    plugin.unstage(volume)
    plugin.delete(volume)


def test_lists_have_pages_and_capacity_is_told(plugin: Csi) -> None:
    made = {
        plugin.make(f"pvc-{number}", mounted(), parameters={"driver": "local"}, size=0).volume_id for number in range(5)
    }
    seen, token = set(), ""
    while True:
        page = plugin.controller.ListVolumes(csi.ListVolumesRequest(max_entries=2, starting_token=token))
        assert len(page.entries) <= 2
        seen |= {each.volume.volume_id for each in page.entries}
        if not (token := page.next_token):
            break
    assert seen == made
    assert len(plugin.controller.ListVolumes(csi.ListVolumesRequest()).entries) == 5
    with refused("ABORTED", "starting_token"):
        plugin.controller.ListVolumes(csi.ListVolumesRequest(starting_token="nonsense"))
    assert plugin.controller.GetCapacity(csi.GetCapacityRequest()).available_capacity > MIB
    many = csi.GetCapacityRequest(volume_capabilities=[mounted(Mode.MULTI_NODE_MULTI_WRITER)])
    assert not plugin.controller.GetCapacity(many).available_capacity
    for volume in made:
        plugin.delete(volume)


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"name": ""}, "INVALID_ARGUMENT", "name"),
    ({"name": "x" * 129}, "INVALID_ARGUMENT", "name"),
    ({"volume_capabilities": []}, "INVALID_ARGUMENT", "volume_capabilities"),
    ({"volume_capabilities": [csi.VolumeCapability()]}, "INVALID_ARGUMENT", "access_type"),
    ({"volume_capabilities": [mounted(0)]}, "INVALID_ARGUMENT", "access_mode"),
    ({"volume_capabilities": [mounted(Mode.MULTI_NODE_MULTI_WRITER)]}, "INVALID_ARGUMENT", "SINGLE_NODE"),
    ({"volume_capabilities": [mounted(flags=("lazytime",))]}, "INVALID_ARGUMENT", "lazytime"),
    ({"volume_capabilities": [mounted(), device()]}, "INVALID_ARGUMENT", "one of them"),
    ({"volume_capabilities": [mounted(fs="ntfs")]}, "INVALID_ARGUMENT", "ntfs"),
    ({"capacity_range": csi.CapacityRange(required_bytes=-1)}, "INVALID_ARGUMENT", "required_bytes"),
    ({"capacity_range": csi.CapacityRange(required_bytes=2 * MIB, limit_bytes=MIB)}, "OUT_OF_RANGE", "limit_bytes"),
    ({"parameters": {"driver": "nothing"}}, "INVALID_ARGUMENT", "driver"),
    ({"parameters": {"nothing": "x"}}, "INVALID_ARGUMENT", "nothing"),
    ({"volume_content_source": csi.VolumeContentSource(
        volume=csi.VolumeContentSource.VolumeSource(volume_id="0" * 64))}, "NOT_FOUND", "volume"),
    ({"volume_content_source": csi.VolumeContentSource(
        snapshot=csi.VolumeContentSource.SnapshotSource(snapshot_id=""))}, "INVALID_ARGUMENT", "volume_content_source"),
    ({"accessibility_requirements": csi.TopologyRequirement(
        requisite=[csi.Topology(segments={"netstore.node": "another"})])}, "RESOURCE_EXHAUSTED", "this node"),
]  # fmt: skip


def test_bad_input_is_refused_and_leaves_nothing(plugin: Csi) -> None:
    good: dict[str, Any] = {"name": "good", "volume_capabilities": [mounted(fs="ext4")]}
    for change, code, says in BAD:
        with refused(code, says):
            plugin.controller.CreateVolume(csi.CreateVolumeRequest(**{**good, **change}))
    for volume in ("", "nothing", "0" * 64):
        code = "NOT_FOUND" if volume else "INVALID_ARGUMENT"
        with refused(code):
            plugin.stage(volume, mounted())
        with refused(code):
            plugin.controller.ControllerGetVolume(csi.ControllerGetVolumeRequest(volume_id=volume))
        with refused(code):
            plugin.controller.CreateSnapshot(csi.CreateSnapshotRequest(source_volume_id=volume, name="s"))
    with refused("INVALID_ARGUMENT", "staging_target_path"):
        plugin.agent.NodeStageVolume(csi.NodeStageVolumeRequest(volume_id="0" * 64, volume_capability=mounted()))
    with refused("INVALID_ARGUMENT", "target_path"):
        plugin.agent.NodeUnpublishVolume(csi.NodeUnpublishVolumeRequest(volume_id="0" * 64, target_path="../x"))
    assert not plugin.node.out("volume", "ls", "-q")
    assert not [each for each in plugin.here.iterdir() if each.name not in ("csi.sock", "csi.log")]


def test_names_are_not_ids_and_sizes_are_in_range(plugin: Csi) -> None:
    volume = plugin.make("pvc-1").volume_id
    other = plugin.make(volume[:2]).volume_id
    assert other != volume
    assert plugin.make(volume[:2]).volume_id == other
    for size in (1, 1 << 50):
        with refused("OUT_OF_RANGE", "16 TiB"):
            plugin.make("odd", size=size)
    with refused("OUT_OF_RANGE", "16 TiB"):
        plugin.controller.ControllerExpandVolume(
            csi.ControllerExpandVolumeRequest(
                volume_id=volume, capacity_range=csi.CapacityRange(required_bytes=1 << 50)
            )
        )
    snapshot = plugin.controller.CreateSnapshot(csi.CreateSnapshotRequest(source_volume_id=volume, name="s")).snapshot
    listed = csi.ListSnapshotsRequest(snapshot_id=snapshot.snapshot_id, source_volume_id=other)
    assert not plugin.controller.ListSnapshots(listed).entries
    listed.source_volume_id = volume
    assert len(plugin.controller.ListSnapshots(listed).entries) == 1
    plugin.controller.DeleteSnapshot(csi.DeleteSnapshotRequest(snapshot_id=snapshot.snapshot_id))
    for each in (volume, other):
        plugin.delete(each)


def test_a_mount_that_somebody_took_away(plugin: Csi) -> None:
    capability = mounted(fs="ext4")
    volume = plugin.make("pvc-1", capability).volume_id
    plugin.stage(volume, capability)
    plugin.publish(volume, capability)
    stats = csi.NodeGetVolumeStatsRequest(volume_id=volume, volume_path=plugin.path("target"))
    plugin.node.host.sh(f"umount {plugin.path('target')}")
    with refused("NOT_FOUND", "not mounted"):  # and not what the node's own disk has
        plugin.agent.NodeGetVolumeStats(stats)
    plugin.node.host.sh(f"rmdir {plugin.path('target')}")
    with refused("NOT_FOUND", "not mounted"):
        plugin.agent.NodeGetVolumeStats(stats)
    plugin.publish(volume, capability)
    assert plugin.agent.NodeGetVolumeStats(stats).usage
    plugin.unpublish(volume)
    plugin.unstage(volume)
    plugin.delete(volume)


def test_secrets_are_in_no_log_and_floods_do_no_harm(plugin: Csi) -> None:
    secret = b"\x2a\x12\x0a\x08password\x12\x06hidden"  # field 5, secrets, which our messages do not have
    request = csi.CreateVolumeRequest(name="with-secret", volume_capabilities=[mounted(Mode.MULTI_NODE_READER_ONLY)])
    raw = plugin.channel.unary_unary("/csi.v1.Controller/CreateVolume")
    with refused("INVALID_ARGUMENT"):
        raw(request.SerializeToString() + secret)
    with refused("UNKNOWN"):  # the word of gRPC for what is no message
        raw(b"\xff" * 100)
    with refused("RESOURCE_EXHAUSTED"):
        raw(csi.CreateVolumeRequest(name="x" * 10 * MIB).SerializeToString())
    wanted = {"name": "one", "parameters": {"driver": "local"}, "volume_capabilities": [mounted()]}

    def call(number: int) -> str:
        try:
            volume = plugin.controller.CreateVolume(csi.CreateVolumeRequest(**wanted)).volume.volume_id
            if number % 3 == 0:
                plugin.delete(volume)
        except grpc.RpcError as error:
            return error.code().name
        return "OK"

    with ThreadPoolExecutor(50) as pool:
        answers = set(pool.map(call, range(1000)))
    assert answers <= {"OK", "NOT_FOUND"}
    plugin.delete(plugin.controller.CreateVolume(csi.CreateVolumeRequest(**wanted)).volume.volume_id)
    assert not plugin.node.out("volume", "ls", "-q")
    assert "hidden" not in (plugin.here / "csi.log").read_text() + plugin.node.log()


def test_killed_in_between_it_goes_on(plugin: Csi) -> None:
    capability = mounted(fs="ext4")
    volume = plugin.make("lasting", capability).volume_id
    plugin.stage(volume, capability)
    plugin.publish(volume, capability)
    plugin.process.kill()
    plugin.process.wait()
    plugin.node.kill()
    plugin.node.start()
    plugin.start()
    wait_until(lambda: _answers(plugin), what="netstore-csi again")
    plugin.node.host.sh(f"umount {plugin.path('target')}")  # as if it had been killed between hold and mount
    plugin.publish(volume, capability)
    plugin.node.host.sh(f"touch {plugin.path('target')}/file")
    plugin.unpublish(volume)
    plugin.unstage(volume)
    plugin.delete(volume)
    assert not os.path.lexists(plugin.path("staged"))


def _answers(plugin: Csi) -> bool:
    try:
        return bool(plugin.identity.Probe(csi.ProbeRequest(), timeout=1).ready.value)
    except grpc.RpcError:
        return False


def test_a_device_is_not_read_only(plugin: Csi) -> None:
    """A read-only mount of a device's node does not stop writes, so it is refused rather than promised."""
    reader = device(Mode.SINGLE_NODE_READER_ONLY)
    with refused("INVALID_ARGUMENT", "read-only"):
        plugin.make("raw", reader, 32 * MIB)
    volume = plugin.make("raw", device(), 32 * MIB).volume_id
    plugin.stage(volume, device())
    with refused("FAILED_PRECONDITION", "read-only"):
        plugin.publish(volume, device(), readonly=True)
    assert not Path(plugin.path("target")).exists()
    plugin.unstage(volume)
    plugin.delete(volume)


def test_a_target_that_is_not_empty(plugin: Csi) -> None:
    """What somebody has left below a target stays, and does not keep the volume published for ever."""
    volume, target = plugin.make("pvc-1").volume_id, Path(plugin.path("target"))
    target.mkdir()
    (target / "left").write_text("somebody's")
    plugin.stage(volume, mounted(fs="ext4"))
    plugin.publish(volume, mounted(fs="ext4"))
    for _ in range(2):
        plugin.unpublish(volume)
    assert (target / "left").read_text() == "somebody's"
    plugin.unstage(volume)
    plugin.delete(volume)
