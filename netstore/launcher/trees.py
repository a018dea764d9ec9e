"""Mounts before they are anywhere: a detached tree with all of its attributes set, ready to be attached in one step.

What a caller names is opened once, beneath its root, and used by descriptor from there on, so that nobody can exchange
it in between.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from netstore.errors import FailedPrecondition, KernelError, NetstoreError, Unsupported
from netstore.kernel import mounts
from netstore.kernel.idmaps import user_namespace
from netstore.kernel.paths import closing, open_beneath
from netstore.model import IdMapping, Mount, MountSpec, MountType

__all__ = ["make_tree", "open_source"]

_NEEDED = {"shared": {"shared"}, "rshared": {"shared"}, "slave": {"shared", "slave"}, "rslave": {"shared", "slave"}}


def make_tree(mount: Mount, *, root: int | None = None, layers: Sequence[Path] = ()) -> int:
    """Return the detached tree of a mount; the caller closes it. `root` is an O_PATH descriptor of the volume's root,
    `layers` are the directories of the image's layers, top first, with an empty one at the bottom. Blocking.

    Raises:
        FailedPrecondition: the subpath is not there or leads out; the source cannot propagate as asked.
        Unsupported: the file system cannot be idmapped.
        KernelError: the kernel refused.
    """
    with ExitStack() as undo:
        tree = _unsettled(mount, root, layers)
        undo.callback(os.close, tree)
        _settle(tree, mount)
        undo.pop_all()
        return tree


def open_source(mount: Mount, root: int | None) -> int:
    """Return an O_PATH descriptor of what a volume's mount or a bind shows; the caller closes it.

    Raises:
        FailedPrecondition: it is not there.
    """
    if root is not None and stat.S_ISBLK(os.fstat(root).st_mode):
        if mount.spec.subpath:
            raise FailedPrecondition(f"volume {mount.volume} is a device: it has no subpath {mount.spec.subpath}")
        return os.dup(root)
    if root is not None:
        return _open_subpath(root, mount.spec.subpath or ".", f"volume {mount.volume}")
    try:
        return os.open(mount.source, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise _missing(error.errno or errno.EIO, mount.source) from error


def _unsettled(mount: Mount, root: int | None, layers: Sequence[Path]) -> int:
    spec = mount.spec
    if spec.type is MountType.TMPFS:
        return mounts.tmpfs(_tmpfs_options(spec))
    if spec.type is MountType.IMAGE:
        whole = mounts.layers_only(layers)
        if not spec.subpath:
            return whole
        with closing(whole), closing(_open_subpath(whole, spec.subpath, f"image {spec.source}")) as part:
            return mounts.clone(part, spec.subpath)
    with closing(open_source(mount, root)) as source:
        wanted = _NEEDED.get(spec.propagation)
        if wanted and not wanted & mounts.propagation(source):
            raise FailedPrecondition(
                f"{spec.source}: propagation {spec.propagation} needs a source that is on a shared mount",
                hint="`mount --make-shared` it on the host, or leave the propagation out", reason="NOT_SHARED",
            )  # fmt: skip
        return mounts.clone(source, mount.volume or mount.source, recursive=spec.recursive != "disabled")


def _settle(tree: int, mount: Mount) -> None:
    spec = mount.spec
    name = mount.volume or mount.source or spec.target
    on = 0
    if spec.type is MountType.TMPFS:
        on = _tmpfs_attributes(spec)
    for wanted, attribute in (
        (spec.no_exec, mounts.MOUNT_ATTR_NOEXEC), (spec.no_suid, mounts.MOUNT_ATTR_NOSUID),
        (spec.no_dev, mounts.MOUNT_ATTR_NODEV),
    ):  # fmt: skip
        on |= attribute if wanted else 0
    private = mounts.MS_PRIVATE if spec.propagation in ("", "private", "rprivate") else 0
    recursive = spec.recursive != "disabled"
    if on or private:
        mounts.set_attributes(tree, name, on=on, propagation=private, recursive=recursive)
    if spec.read_only:
        read_only_beneath = recursive and spec.recursive != "writable"
        mounts.set_attributes(tree, name, on=mounts.MOUNT_ATTR_RDONLY, recursive=read_only_beneath)
    if spec.uid_mappings or spec.gid_mappings:
        _map_ids(tree, name, spec)


def _map_ids(tree: int, name: str, spec: MountSpec) -> None:
    uids = _ranges(spec.uid_mappings or spec.gid_mappings)
    with closing(user_namespace(uids, _ranges(spec.gid_mappings or spec.uid_mappings))) as namespace:
        try:
            mounts.set_attributes(
                tree, name, on=mounts.MOUNT_ATTR_IDMAP, user_namespace=namespace, recursive=spec.recursive != "disabled"
            )
        except KernelError as error:
            if error.errno not in (errno.EINVAL, errno.EPERM, errno.ENOSYS):
                raise
            raise Unsupported(
                f"uid_mappings: the file system of {name}, or one mounted beneath it, cannot map ids",
                hint="use a file system that can (ext4, xfs, btrfs, tmpfs since Linux 6.3), or leave the mappings out",
                reason="IDMAP_UNSUPPORTED",
            ) from error  # fmt: skip


def _ranges(mappings: Sequence[IdMapping]) -> list[tuple[int, int, int]]:
    return [(each.stored_id, each.mount_id, each.count) for each in mappings]


def _tmpfs_options(spec: MountSpec) -> list[str]:
    options = [f"mode={spec.tmpfs_mode or 0o1777:o}"]
    options += [f"size={spec.tmpfs_size_bytes}"] if spec.tmpfs_size_bytes else []
    return options + [option for option in spec.tmpfs_options if "=" in option]


def _tmpfs_attributes(spec: MountSpec) -> int:
    """As Docker: noexec, nosuid and nodev unless the options say otherwise."""
    pairs = (("exec", mounts.MOUNT_ATTR_NOEXEC), ("suid", mounts.MOUNT_ATTR_NOSUID), ("dev", mounts.MOUNT_ATTR_NODEV))
    return sum(attribute for option, attribute in pairs if option not in spec.tmpfs_options)


def _open_subpath(root: int, subpath: str, of: str) -> int:
    try:
        return open_beneath(root, subpath, os.O_PATH, links=True)
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            what, hint = f"subpath {subpath!r} of {of} does not exist", "create it first"
        elif error.errno in (errno.EXDEV, errno.ELOOP):
            what, hint = f"subpath {subpath!r} leads out of {of}", "a path whose links stay inside"
        else:
            raise
        raise FailedPrecondition(what, hint=hint, reason="BAD_SUBPATH", subpath=subpath) from error


def _missing(code: int, source: str) -> NetstoreError:
    if code in (errno.ENOENT, errno.ENOTDIR):
        return FailedPrecondition(
            f"{source} does not exist on this node", hint="create it, or let -v (or bind-create-src) make a directory",
            reason="BIND_SOURCE_MISSING",
        )  # fmt: skip
    return KernelError(code, "opening", source)
