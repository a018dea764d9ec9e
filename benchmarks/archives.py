"""Exports and imports of volumes, beside tar and zstd piped by hand.

Runs inside a network and mount namespace of its own; `scripts/bench archives` makes it. Figures are milliseconds.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from common import BIN, measure, sh, show, start_netstore

from netstore.api.v1 import archive_pb2, volume_pb2
from netstore.client import BlockingClient as Client

ROUNDS = 5
MIB = 1 << 20


def create(client: Client, name: str, **spec: object) -> volume_pb2.Volume:
    volume = volume_pb2.Volume(name=name, spec=volume_pb2.VolumeSpec(**spec))  # type: ignore[arg-type]
    return client.volumes.CreateVolume(volume_pb2.CreateVolumeRequest(volume=volume)).volume


def archives(client: Client, place: Path) -> None:
    data = Path(create(client, "data").status.mountpoint)
    for index in range(4000):
        (data / f"d{index % 40}").mkdir(exist_ok=True)
        (data / f"d{index % 40}/{index}").write_bytes((b"%d some words of text " % index) * 300 + os.urandom(6000))
    (data / "big").write_bytes(os.urandom(60 * MIB) + b"text " * (12 * MIB))
    os.sync()
    size = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    out, hand = place / "netstore.tar.zst", place / "hand.tar.zst"
    pack = f"tar -C {data} --xattrs --sparse --format=posix -cf - . | zstd -q -T0 -3 > {hand}"
    stream = f"{BIN}/netstore -H {client.address} volume export data > {out} 2>/dev/null"

    def through(_: int) -> None:
        with out.open("wb") as file:
            for response in client.archives.ExportVolume(archive_pb2.ExportVolumeRequest(volume="data")):
                file.write(response.chunk)

    by_hand: list[float] = []
    ours: list[float] = []
    for _ in range(ROUNDS):  # in turns: the machine is not the same all the time
        by_hand += measure(lambda _: sh(pack), 1)
        ours += measure(through, 1)
    first = show(f"tar | zstd -3 -T0 by hand, {size >> 20} MiB", by_hand, f"{hand.stat().st_size >> 20} MiB packed")
    second = show("export, through gRPC, with sha256", ours, f"{out.stat().st_size >> 20} MiB packed")
    show("export, the command", measure(lambda _: sh(stream), ROUNDS))
    print(f"export runs at {first / second:.2f} of tar | zstd by hand", flush=True)

    def unpack(index: int) -> None:
        sh(f"mkdir {place}/hand{index} && zstd -dcq {hand} | tar -C {place}/hand{index} -x --xattrs && sync -f {place}")

    def requests(index: int) -> Iterator[archive_pb2.ImportVolumeRequest]:
        start = archive_pb2.ImportVolumeStart(
            volume=volume_pb2.Volume(name=f"imported{index}"), upload_id=str(uuid.uuid4())
        )
        yield archive_pb2.ImportVolumeRequest(start=start)
        with out.open("rb") as file:
            while chunk := file.read(MIB):
                yield archive_pb2.ImportVolumeRequest(chunk=chunk)
        yield archive_pb2.ImportVolumeRequest(end=archive_pb2.ImportVolumeEnd())

    show("zstd -d | tar -x by hand, and sync", measure(unpack, ROUNDS))
    show("import, through gRPC, durable", measure(lambda i: client.archives.ImportVolume(requests(i)), ROUNDS))


def main() -> None:
    place = Path(sys.argv[1])
    client = start_netstore(place)
    print(f"{'':<52}{'p50':>9}{'least':>9}{'p95':>9}  {time.strftime('%F')}")
    archives(client, place)


main()
