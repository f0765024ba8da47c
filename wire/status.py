"""core errors -> gRPC status, for every servicer."""

from typing import Any, NoReturn

import grpc

from tandem.core.errors import OverloadedError, TandemError
from tandem.rpc_errors import CODE_KEY, PARAM_KEY, RETRY_AFTER_KEY, error_from_rpc

__all__ = ["abort", "error_from_rpc"]


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: TandemError) -> NoReturn:
    """End the call with the error's status; the client finds its other values in the trailing metadata."""
    metadata: tuple[tuple[str, str], ...] = ((CODE_KEY, error.code), (PARAM_KEY, error.param or ""))
    if isinstance(error, OverloadedError):
        metadata = (*metadata, (RETRY_AFTER_KEY, f"{error.retry_after_s:.3f}"))
    await context.abort(grpc.StatusCode[error.grpc_status], error.message, metadata)
    raise AssertionError("abort does not return")
