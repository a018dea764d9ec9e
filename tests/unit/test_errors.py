"""Errors: every class is drawn, maps to a code, and carries what a program needs."""

from __future__ import annotations

import errno

import grpc
import pytest
from google.rpc import error_details_pb2

from netstore import errors
from netstore.errors import InvalidArgument, KernelError, NetstoreError
from netstore.rpc.errors import status_of


def test_every_class_is_drawn_and_exported() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, NetstoreError)]
    assert sorted(c.__name__ for c in classes) == sorted(errors.__all__)
    assert all(c.__name__ in (errors.__doc__ or "") for c in classes)
    assert all(hasattr(grpc.StatusCode, c.code) for c in classes)


def test_status_carries_reason_hint_and_field() -> None:
    status = status_of(InvalidArgument("spec.subnet", "10.0.0.1/24", "10.0.0.0/24"))
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad)
    assert (info.domain, info.reason, info.metadata["hint"]) == ("netstore", "INVALID_FIELD", "10.0.0.0/24")
    assert bad.field_violations[0].field == "spec.subnet"


@pytest.mark.parametrize(
    ("code", "name"),
    [(errno.ENOSPC, "RESOURCE_EXHAUSTED"), (errno.EPERM, "PERMISSION_DENIED"), (errno.EIO, "INTERNAL")],
)
def test_kernel_errors_map_by_errno(code: int, name: str) -> None:
    error = KernelError(code, "making", "nsbr-1")
    assert error.code == name
    assert error.reason == f"KERNEL_{errno.errorcode[code]}"
