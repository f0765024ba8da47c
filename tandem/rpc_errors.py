"""How a TandemError travels over gRPC: its status, its message as details, the rest as trailing metadata."""

from typing import Any, Protocol

import grpc

from tandem.core.errors import (
    CancelledError,
    DeadlineError,
    InternalError,
    OverloadedError,
    TandemError,
    UnavailableError,
    error_from_code,
)

CODE_KEY = "tandem-code"
PARAM_KEY = "tandem-param"
RETRY_AFTER_KEY = "tandem-retry-after-s"
REFUSED_BECAUSE_KEY = "x-tandem-refused-because"


class RpcFailure(Protocol):
    """A failed call of grpc or grpc.aio."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Any: ...


def _text_metadata(metadata: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in (metadata or ())}


def error_from_rpc(rpc_error: RpcFailure) -> TandemError:
    """The error that the server raised, or, when the call itself failed, the error that the caller should see."""
    metadata = _text_metadata(rpc_error.trailing_metadata())
    details = rpc_error.details() or "no reason given"
    if code := metadata.get(CODE_KEY):
        error = error_from_code(code, details, metadata.get(PARAM_KEY) or None)
        if isinstance(error, OverloadedError) and (seconds := metadata.get(RETRY_AFTER_KEY)):
            error.retry_after_s = float(seconds)
            error.reason = metadata.get(REFUSED_BECAUSE_KEY, error.reason)
        return error
    match rpc_error.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError("the deadline passed before the answer came")
        case grpc.StatusCode.CANCELLED:
            return CancelledError("the call was cancelled")
        case grpc.StatusCode.UNAVAILABLE:
            return UnavailableError(f"the server cannot be reached ({details})")
        case status:
            return InternalError(f"the call failed with {status.name}: {details}")
