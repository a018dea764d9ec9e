"""What containers mean for the store: their rows, with those of their sandbox and endpoints, inside one transaction."""

from __future__ import annotations

from dataclasses import replace

from netstore.errors import FailedPrecondition, InUse, NetstoreError
from netstore.model import Container, ContainerState, Endpoint, Image, Kind, Network, Sandbox
from netstore.store import Transaction

__all__ = [
    "Joined",
    "all_joined",
    "forget",
    "joined",
    "mark_stopped",
    "record_failure",
    "refuse_joined",
    "remove",
    "require_running",
    "sharing",
]

Joined = tuple[Container, Image, Sandbox, list[tuple[Endpoint, Network, Sandbox]]]


def joined(tx: Transaction, container: Container) -> Joined:
    """Return a container with its image, its sandbox, and the sandbox's endpoints."""
    sandbox = tx.sandboxes.require(container.sandbox_id)
    endpoints = [
        (each, tx.networks.require(each.network_id), sandbox) for each in tx.endpoints.all("sandbox_id = ?", sandbox.id)
    ]
    return container, tx.images.require(container.image_id), sandbox, endpoints


def all_joined(tx: Transaction, where: str, *values: object) -> list[Joined]:
    """Return the containers that an SQL condition selects, as `joined` does; what many share is read once."""
    images = {each.id: each for each in tx.images.all()}
    networks = {each.id: each for each in tx.networks.all()}
    theirs = f"IN (SELECT sandbox_id FROM containers WHERE {where})"
    sandboxes = {each.id: each for each in tx.sandboxes.all(f"id {theirs}", *values)}
    inside: dict[str, list[tuple[Endpoint, Network, Sandbox]]] = {each: [] for each in sandboxes}
    for endpoint in tx.endpoints.all(f"sandbox_id {theirs}", *values):
        inside[endpoint.sandbox_id].append((endpoint, networks[endpoint.network_id], sandboxes[endpoint.sandbox_id]))
    return [
        (each, images[each.image_id], sandboxes[each.sandbox_id], inside[each.sandbox_id])
        for each in tx.containers.all(where, *values)
    ]


def sharing(tx: Transaction, container: Container) -> tuple[Sandbox, list[str]]:
    """Return a container's sandbox, and the names of the other containers that run in it."""
    others = tx.containers.all("sandbox_id = ? AND id != ?", container.sandbox_id, container.id)
    running = [other.name for other in others if other.state is ContainerState.RUNNING]
    return tx.sandboxes.require(container.sandbox_id), running


def refuse_joined(tx: Transaction, container: Container) -> None:
    """Refuse when other containers have joined a container's sandbox.

    Raises:
        InUse: they have.
    """
    sandbox = tx.sandboxes.require(container.sandbox_id)
    if sandbox.container_id != container.id:
        return
    others = [each.name for each in tx.containers.all("sandbox_id = ? AND id != ?", sandbox.id, container.id)]
    if others:
        raise InUse(
            f"{', '.join(others)} joined the network of container {container.name}",
            hint="remove them first", containers=", ".join(others),
        )  # fmt: skip


def require_running(container: Container) -> None:
    """Refuse a container that does not run.

    Raises:
        FailedPrecondition: it does not.
    """
    if container.state is not ContainerState.RUNNING:
        raise FailedPrecondition(
            f"container {container.name} is not running",
            hint=f"`netstore start {container.name}`",
            reason="NOT_RUNNING",
        )


def remove(tx: Transaction, container_id: str) -> list[str]:
    """Remove a container's rows; returns the ids of its anonymous volumes."""
    container = tx.containers.require(container_id)
    if container.state is ContainerState.RUNNING:
        raise FailedPrecondition(
            f"container {container.name} is running", hint="stop it first", reason="CONTAINER_RUNNING"
        )
    refuse_joined(tx, container)
    mounted = [mount.volume_id for mount in container.mounts if mount.volume_id]
    volumes = [volume for volume_id in mounted if (volume := tx.volumes.get(volume_id))]
    forget(tx, container)
    return [volume.id for volume in volumes if volume.anonymous]


def forget(tx: Transaction, container: Container) -> None:
    """Remove a container's rows, those of its sandbox and reservations too where the sandbox is its own."""
    present = tx.containers.get(container.id)
    if present is None:
        return
    tx.event(Kind.CONTAINER, "remove", present.id, present.name)
    tx.containers.delete(present.id)
    sandbox = tx.sandboxes.require(present.sandbox_id)
    if sandbox.container_id == present.id:
        for endpoint in tx.endpoints.all("sandbox_id = ?", sandbox.id):
            tx.endpoints.delete(endpoint.id)
        tx.sandboxes.delete(sandbox.id)


def mark_stopped(tx: Transaction, *, container_id: str) -> None:
    """Record that somebody stopped a container: its restart policy leaves it alone."""
    container = tx.containers.get(container_id)
    if container and not container.stopped:
        tx.containers.update(replace(container, stopped=True))


def record_failure(tx: Transaction, *, container_id: str, error: NetstoreError) -> None:
    """Record why a container could not be started."""
    container = tx.containers.get(container_id)
    if container:
        code = int(error.metadata.get("exit_code", "125"))
        tx.containers.update(replace(container, message=error.what, exit_code=code))
