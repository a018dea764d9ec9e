"""Every error that a caller can see.

    NetstoreError              what, hint, gRPC code, reason (ErrorInfo), metadata
    ├── InvalidArgument        a field breaks its rule; carries the field          INVALID_ARGUMENT
    ├── NotFound               no such resource                                    NOT_FOUND
    ├── AlreadyExists          the name is taken by another spec                   ALREADY_EXISTS
    ├── FailedPrecondition     right request, wrong moment                         FAILED_PRECONDITION
    │   ├── InUse              something still refers to it
    │   ├── Immutable          the field cannot change
    │   └── AddressTaken       an address, MAC or port has a holder
    ├── Exhausted              no address, port or space left                      RESOURCE_EXHAUSTED
    ├── Conflict               the etag is not the current one                     ABORTED
    ├── OutOfRange             the revision is older than the history              OUT_OF_RANGE
    ├── Unavailable            try again: a part is stopping or not there          UNAVAILABLE
    ├── Unsupported            this kernel or this version cannot                  UNIMPLEMENTED
    └── KernelError            the kernel refused; carries errno                   INTERNAL, or what errno means

Foreign errors become one of these at one boundary a library: netlink, mounts and nftables in `kernel/`, SQLite in
`store/`, the OCI runtime in `launcher/`.
"""

from __future__ import annotations

import errno as _errno
import os
from enum import Enum

__all__ = [
    "AddressTaken",
    "AlreadyExists",
    "Conflict",
    "Exhausted",
    "FailedPrecondition",
    "Immutable",
    "InUse",
    "InvalidArgument",
    "KernelError",
    "NetstoreError",
    "NotFound",
    "OutOfRange",
    "Unavailable",
    "Unsupported",
]


class NetstoreError(Exception):
    """An error with what happened, what to do about it, and a machine-readable reason.

    `code` is the name of a gRPC status code; `reason` is UPPER_SNAKE, stable, and part of the API.
    """

    code = "INTERNAL"
    reason = "INTERNAL"

    def __init__(self, what: str, *, hint: str = "", reason: str = "", **metadata: object) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.reason = reason or type(self).reason
        self.metadata = {key: str(value) for key, value in metadata.items()}

    def __str__(self) -> str:
        return f"{self.what}: {self.hint}" if self.hint else self.what


class InvalidArgument(NetstoreError):
    """A field breaks its rule. `accepted` says what would do."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_FIELD"

    def __init__(self, field: str, value: object, accepted: str, *, reason: str = "", **metadata: object) -> None:
        shown = repr(value.value if isinstance(value, Enum) else value)
        shown = shown if len(shown) <= 200 else shown[:200] + "…"
        super().__init__(f"{field}: {shown} is not accepted", hint=accepted, reason=reason, field=field, **metadata)
        self.field = field
        self.value = value
        self.accepted = accepted


class NotFound(NetstoreError):
    """No resource of that kind goes by that name or id."""

    code = "NOT_FOUND"
    reason = "NOT_FOUND"

    def __init__(self, kind: str, name: str, *, hint: str = "") -> None:
        super().__init__(f"no such {kind}: {name}", hint=hint, kind=kind, name=name)


class AlreadyExists(NetstoreError):
    """The name is taken, and what has it differs from what was asked for."""

    code = "ALREADY_EXISTS"
    reason = "ALREADY_EXISTS"


class FailedPrecondition(NetstoreError):
    """The request is right, but not now."""

    code = "FAILED_PRECONDITION"
    reason = "FAILED_PRECONDITION"


class InUse(FailedPrecondition):
    """Something still refers to the resource; metadata names it."""

    reason = "IN_USE"


class Immutable(FailedPrecondition):
    """The field cannot change after create."""

    reason = "IMMUTABLE_FIELD"

    def __init__(self, field: str, mutable: str) -> None:
        super().__init__(f"{field} cannot change after create", hint=f"mutable: {mutable}", field=field)


class AddressTaken(FailedPrecondition):
    """An address, MAC or host port has a holder; metadata names it."""

    reason = "ADDRESS_TAKEN"


class Exhausted(NetstoreError):
    """No address, pool, port or space is left."""

    code = "RESOURCE_EXHAUSTED"
    reason = "EXHAUSTED"


class Conflict(NetstoreError):
    """Somebody changed the resource in between."""

    code = "ABORTED"
    reason = "ETAG_MISMATCH"


class OutOfRange(NetstoreError):
    """The revision is older than the history that is kept."""

    code = "OUT_OF_RANGE"
    reason = "HISTORY_TRIMMED"


class Unavailable(NetstoreError):
    """A part is stopping or not there; trying again may succeed."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class Unsupported(NetstoreError):
    """This kernel, or this version, cannot do it."""

    code = "UNIMPLEMENTED"
    reason = "UNSUPPORTED"


_ERRNO_CODES = {
    _errno.ENOSPC: "RESOURCE_EXHAUSTED",
    _errno.EDQUOT: "RESOURCE_EXHAUSTED",
    _errno.ENOMEM: "RESOURCE_EXHAUSTED",
    _errno.EMFILE: "RESOURCE_EXHAUSTED",
    _errno.ENFILE: "RESOURCE_EXHAUSTED",
    _errno.EXFULL: "RESOURCE_EXHAUSTED",
    _errno.EOPNOTSUPP: "UNIMPLEMENTED",
    _errno.ENOSYS: "UNIMPLEMENTED",
    _errno.EPERM: "PERMISSION_DENIED",
    _errno.EACCES: "PERMISSION_DENIED",
    _errno.EBUSY: "FAILED_PRECONDITION",
}


class KernelError(NetstoreError):
    """The kernel refused. `doing` says what we asked of it, `to` to what object."""

    reason = "KERNEL"

    def __init__(self, errno: int, doing: str, to: str, *, hint: str = "") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(
            f"{doing} {to}: {os.strerror(errno)} ({name})", hint=hint, reason=f"KERNEL_{name}", object=to, errno=errno
        )
        self.errno = errno
        self.code = _ERRNO_CODES.get(errno, "INTERNAL")
