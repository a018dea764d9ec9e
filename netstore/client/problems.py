"""Errors of netstored as a program wants them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import grpc

__all__ = ["Problem"]


@dataclass(frozen=True)
class Problem:
    """What a refused or failed call tells. Branch on `code` and `reason`, show `message` and `hint`."""

    code: grpc.StatusCode
    message: str
    metadata: Mapping[str, str]
    """All of google.rpc.ErrorInfo's; empty where no netstored answered."""
    reason: str = ""
    """A word of the contract's error tables; "" where no netstored answered."""

    @classmethod
    def of(cls, error: grpc.RpcError) -> Problem:
        """Read a call's error, asyncio's or not."""
        from google.rpc import error_details_pb2
        from grpc_status import rpc_status

        status = rpc_status.from_call(error)
        info = error_details_pb2.ErrorInfo()
        for detail in status.details if status else ():
            if detail.Unpack(info):
                break
        return cls(error.code(), error.details() or str(error.code()), dict(info.metadata), info.reason)

    @property
    def hint(self) -> str:
        """What to do about it, "" where nobody knows."""
        return self.metadata.get("hint", "")

    @property
    def unreachable(self) -> bool:
        """Whether no netstored answered."""
        return self.code is grpc.StatusCode.UNAVAILABLE and not self.metadata
