"""core errors -> gRPC status, for every servicer."""

from typing import Any, NoReturn

import grpc

from tandem.core.errors import TandemError
from tandem.rpc_errors import CODE_KEY, PARAM_KEY, error_from_rpc

__all__ = ["abort", "error_from_rpc"]


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: TandemError) -> NoReturn:
    """End the call with the error's status; the client finds the code and the param in the trailing metadata."""
    metadata = ((CODE_KEY, error.code), (PARAM_KEY, error.param or ""))
    await context.abort(grpc.StatusCode[error.grpc_status], error.message, metadata)
    raise AssertionError("abort does not return")
