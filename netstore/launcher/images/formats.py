"""What archives of images look like: a root filesystem, docker save's, an OCI image layout in a tar.

The archive is a file, indexed once by member; layers are then unpacked from where they lie in it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

from netstore.archive import Reader, compressed, decompressed
from netstore.errors import InvalidArgument
from netstore.launcher.images.layers import Layers
from netstore.model import ImageConfig

__all__ = ["Format", "Imported", "import_archive"]

_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
_MAX_JSON = 4 << 20


class Format(StrEnum):
    """Formats of archives."""

    ROOTFS = "rootfs"
    DOCKER = "docker-archive"
    OCI = "oci-archive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """An image as an archive holds it, its layers on disk. `id` is the sha256 of its configuration."""

    id: str
    names: tuple[str, ...]
    config: ImageConfig
    layers: tuple[str, ...]
    size_bytes: int
    architecture: str
    os: str


@dataclass(frozen=True, slots=True)
class _Member:
    offset: int
    size: int
    link: str = ""


class _Slice:
    """A part of a file, read in order."""

    def __init__(self, file: BinaryIO, member: _Member) -> None:
        self._file, self._left = file, member.size
        file.seek(member.offset)

    def read(self, size: int, /) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data


def import_archive(
    path: Path, layers: Layers, *, name: str = "", format: Format | None = None, config: ImageConfig | None = None
) -> list[Imported]:
    """Import every image of an archive file. `config` is for a root filesystem, and refused for other formats.

    Raises:
        InvalidArgument: damaged, incomplete, hostile, or of another format than said.
    """
    with layers.staging() as staging:
        archive = _Archive(path, staging)
        found = archive.format()
        if format is not None and found is not format:
            raise InvalidArgument("format", format, f"{found}, for that is what the archive is")
        if found is Format.ROOTFS:
            if not name:
                raise InvalidArgument("name", "", "repository[:tag], for a root filesystem has no name of its own")
            return [_import_rootfs(path, layers, staging, name, config or ImageConfig())]
        if config is not None and config != ImageConfig():
            raise InvalidArgument("config", found, "nothing, for this format brings its own configuration")
        images = archive.docker(layers) if found is Format.DOCKER else archive.oci(layers)
        if name and len(images) > 1:
            raise InvalidArgument("name", name, f"nothing, for the archive holds {len(images)} images")
        return images


def _import_rootfs(path: Path, layers: Layers, staging: Path, name: str, config: ImageConfig) -> Imported:
    with path.open("rb") as file:
        digest, unpacked = layers.add(file, staging)
    if not unpacked.count:
        raise InvalidArgument("archive", "empty", "a root filesystem", reason="ARCHIVE_DAMAGED", offset=0)
    architecture = _MACHINES.get(platform.machine(), platform.machine())
    document = {
        "architecture": architecture,
        "os": "linux",
        "config": {
            "Entrypoint": list(config.entrypoint),
            "Cmd": list(config.cmd),
            "Env": list(config.env),
            "WorkingDir": config.working_dir,
            "User": config.user,
            "Volumes": {each: {} for each in config.volumes},
            "ExposedPorts": {each: {} for each in config.exposed_ports},
            "StopSignal": config.stop_signal,
            "Labels": dict(config.labels),
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    return Imported(
        id=hashlib.sha256(text).hexdigest(), names=(name,), config=config, layers=(digest,),
        size_bytes=unpacked.size_bytes, architecture=architecture, os="linux",
    )  # fmt: skip


class _Archive:
    """An archive file and the index of its members; what is compressed as a whole is made plain first."""

    def __init__(self, path: Path, staging: Path) -> None:
        self._staging = staging
        self._path = path
        with path.open("rb") as file:
            if compressed(file.read(4)):
                file.seek(0)
                self._path = staging / "plain.tar"
                _write_plain(Reader(decompressed(file)), self._path)
        self._members: dict[str, _Member] = {}
        with self._path.open("rb") as file:
            reader = Reader(file)
            for entry in reader:
                self._members[entry.name.removeprefix("./").rstrip("/")] = _Member(
                    reader.offset, entry.size, entry.link if entry.type in "12" else ""
                )

    def format(self) -> Format:
        """Say what the members make of it."""
        if "oci-layout" in self._members and "index.json" in self._members:
            return Format.OCI
        if "manifest.json" in self._members:
            return Format.DOCKER
        return Format.ROOTFS

    def docker(self, layers: Layers) -> list[Imported]:
        """Import what docker save wrote (moby image-spec v1.2)."""
        images = []
        for entry in _typed(self._json("manifest.json"), list, "manifest.json"):
            config_name = _typed(_typed(entry, dict, "manifest.json").get("Config"), str, "manifest.json Config")
            config = self._bytes(config_name)
            names = _texts(entry.get("RepoTags") or [], "manifest.json RepoTags")
            sources = _texts(entry.get("Layers"), "manifest.json Layers")
            images.append(self._image(layers, config, [(name, "") for name in sources], names))
        return images

    def oci(self, layers: Layers) -> list[Imported]:
        """Import an OCI image layout (image-spec, image-layout.md)."""
        images = []
        for descriptor in _typed(
            _typed(self._json("index.json"), dict, "index.json").get("manifests"), list, "manifests"
        ):
            manifest = self._manifest(_typed(descriptor, dict, "manifests of index.json"))
            annotations = _typed(descriptor.get("annotations") or {}, dict, "annotations of index.json")
            reference = _typed(annotations.get("org.opencontainers.image.ref.name", ""), str, "ref.name of index.json")
            config = self._blob(_typed(manifest.get("config"), dict, "manifest config"))
            sources = [
                (_blob_path(_typed(layer, dict, "layers")), str(layer.get("digest")))
                for layer in _typed(manifest.get("layers"), list, "layers")
            ]
            images.append(self._image(layers, config, sources, (reference,) if reference else ()))
        return images

    def _manifest(self, descriptor: Mapping[str, Any]) -> dict[str, Any]:
        """Return the manifest for this machine; an index in an index is followed."""
        document: dict[str, Any] = _typed(_parse(self._blob(descriptor), "manifest"), dict, "manifest")
        if "manifests" not in document:
            return document
        wanted = _MACHINES.get(platform.machine(), platform.machine())
        for each in _typed(document["manifests"], list, "manifests"):
            platforms = _typed(_typed(each, dict, "manifests").get("platform") or {}, dict, "platform")
            if platforms.get("architecture") == wanted:
                return self._manifest(each)
        raise InvalidArgument("archive", "index", f"an image for {wanted}", reason="NO_PLATFORM")

    def _image(self, layers: Layers, config: bytes, sources: list[tuple[str, str]], names: tuple[str, ...]) -> Imported:
        document = _typed(_parse(config, "configuration"), dict, "configuration")
        rootfs = _typed(document.get("rootfs"), dict, "rootfs of the configuration")
        diff_ids = _typed(rootfs.get("diff_ids"), list, "rootfs.diff_ids of the configuration")
        if len(diff_ids) != len(sources):
            raise _incomplete(f"{len(diff_ids)} diff_ids for {len(sources)} layers")
        digests = [_diff_id(each) for each in diff_ids]
        size = 0
        for (name, digest), diff_id in zip(sources, digests, strict=True):
            if diff_id in layers:
                size += layers.usage(diff_id)
                continue
            if digest:
                self._verify(name, digest)
            with self._path.open("rb") as file:
                _, unpacked = layers.add(_Slice(file, self._member(name)), self._staging, expected=diff_id)
            size += unpacked.size_bytes
        return Imported(
            id=hashlib.sha256(config).hexdigest(), names=names, config=_config(document.get("config") or {}),
            layers=tuple(digests), size_bytes=size, architecture=str(document.get("architecture", "")),
            os=str(document.get("os", "linux")),
        )  # fmt: skip

    def _member(self, name: str) -> _Member:
        found = self._members.get(name)
        if found is not None and found.link:  # older docker save links equal layers
            found = self._members.get(str(Path(Path(name).parent, found.link)).replace("/..", "")) or self._members.get(
                found.link.removeprefix("../")
            )
        if found is None:
            raise _incomplete(f"{name} is missing")
        return found

    def _bytes(self, name: str) -> bytes:
        member = self._member(name)
        if member.size > _MAX_JSON:
            raise _incomplete(f"{name} has {member.size} bytes")
        with self._path.open("rb") as file:
            return _Slice(file, member).read(member.size)

    def _json(self, name: str) -> Any:
        return _parse(self._bytes(name), name)

    def _blob(self, descriptor: Mapping[str, Any]) -> bytes:
        name = _blob_path(descriptor)
        data = self._bytes(name)
        if hashlib.sha256(data).hexdigest() != name.rsplit("/", 1)[1]:
            raise _incomplete(f"{name} is not what its name says")
        return data

    def _verify(self, name: str, digest: str) -> None:
        sha256 = hashlib.sha256()
        with self._path.open("rb") as file:
            part = _Slice(file, self._member(name))
            while chunk := part.read(1 << 20):
                sha256.update(chunk)
        if f"sha256:{sha256.hexdigest()}" != digest:
            raise _incomplete(f"{name} is not what its digest says")


def _write_plain(reader: Reader, target: Path) -> None:
    with target.open("wb") as file:
        for chunk in reader.chunks():
            file.write(chunk)


def _blob_path(descriptor: Mapping[str, Any]) -> str:
    algorithm, _, digest = str(descriptor.get("digest", "")).partition(":")
    if algorithm != "sha256" or len(digest) != 64:
        raise _incomplete(f"a descriptor without a sha256 digest: {descriptor.get('digest')}")
    return f"blobs/{algorithm}/{digest}"


def _config(document: Mapping[str, Any]) -> ImageConfig:
    """Read the defaults to run an image (OCI image-spec, config.md)."""
    document = _typed(document, dict, "config of the configuration")
    try:
        return ImageConfig(
            entrypoint=tuple(document.get("Entrypoint") or ()),
            cmd=tuple(document.get("Cmd") or ()),
            env=tuple(document.get("Env") or ()),
            working_dir=document.get("WorkingDir") or "",
            user=document.get("User") or "",
            volumes=tuple(document.get("Volumes") or ()),
            exposed_ports=tuple(document.get("ExposedPorts") or ()),
            stop_signal=document.get("StopSignal") or "",
            labels=dict(document.get("Labels") or {}),
        )
    except (TypeError, ValueError) as error:
        raise _incomplete(f"the configuration: {error}") from error


def _parse(data: bytes, what: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _incomplete(f"{what} is no JSON: {error}") from error


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise _incomplete(f"{what} is missing or no {kind.__name__}")
    return value


def _texts(value: Any, what: str) -> tuple[str, ...]:
    return tuple(_typed(each, str, what) for each in _typed(value, list, what))


def _diff_id(value: object) -> str:
    """Return a layer's digest. It names a directory: "/" would be the node's own."""
    found = re.fullmatch("sha256:([0-9a-f]{64})", str(value))
    if found is None:
        raise _incomplete(f"the diff_id {str(value)[:100]!r} is no sha256")
    return found[1]


def _incomplete(why: str) -> InvalidArgument:
    return InvalidArgument("archive", why, "a whole archive: save it again", reason="ARCHIVE_DAMAGED", offset=0)
