"""Errors of requests and commands, with the codes that gRPC and HTTP clients get.

Invalid input from outside (clients, files, peers) raises one of these errors; `assert` is for internal invariants.
"""

from typing import ClassVar


class TandemError(Exception):
    """Base of all errors. The message is one sentence for users, without internals (memory addresses, segment names).

    `code` is the stable name on the wire; `grpc_status` and `http_status` are the statuses that clients get.
    `retryable`: the same request may succeed later or on another instance. `param` is the request field at fault.
    """

    code: ClassVar[str] = "internal"
    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(TandemError):
    """The request is invalid; a retry fails too."""

    code = "invalid_request"
    grpc_status = "INVALID_ARGUMENT"
    http_status = 400
    openai_type = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """The prompt, or prompt and output, exceed the model's context or the KV memory."""

    code = "context_length_exceeded"


class NotFoundError(InvalidRequestError):
    code = "not_found"
    grpc_status = "NOT_FOUND"
    http_status = 404


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class PayloadTooLargeError(InvalidRequestError):
    code = "payload_too_large"
    http_status = 413


class UnsupportedMediaTypeError(InvalidRequestError):
    code = "unsupported_media_type"
    http_status = 415


class RequestTimeoutError(InvalidRequestError):
    """The request did not arrive in time."""

    code = "request_timeout"
    http_status = 408


class HeadersTooLargeError(InvalidRequestError):
    code = "headers_too_large"
    http_status = 431


class ForbiddenHostError(InvalidRequestError):
    """The Host header names another machine: a web page may have rebound its own name to this one."""

    code = "forbidden_host"
    grpc_status = "PERMISSION_DENIED"
    http_status = 403


class UnauthenticatedError(TandemError):
    code = "unauthenticated"
    grpc_status = "UNAUTHENTICATED"
    http_status = 401
    openai_type = "invalid_request_error"


class PermissionDeniedError(TandemError):
    """The caller is known, and may not do this."""

    code = "permission_denied"
    grpc_status = "PERMISSION_DENIED"
    http_status = 403
    openai_type = "invalid_request_error"


class DuplicateRequestError(TandemError):
    code = "already_exists"
    grpc_status = "ALREADY_EXISTS"
    http_status = 409
    openai_type = "invalid_request_error"


class OverloadedError(TandemError):
    """There is more work than can be done in time; try again after `retry_after_s`. `reason` is one of a few words, for
    programs: `ttft-target`, `tpot-target`, `max-wait`, `deadline`, `queue-full`, `client-limit`, `key-requests`,
    `key-rate`, `overloaded`."""

    code = "overloaded"
    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 429
    openai_type = "rate_limit_error"
    retryable = True

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float = 1.0, reason: str = "overloaded"
    ) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s
        self.reason = reason


class UnavailableError(TandemError):
    """No instance can serve the request now, or the instance that served it is lost."""

    code = "unavailable"
    grpc_status = "UNAVAILABLE"
    http_status = 503
    retryable = True


class DeadlineError(TandemError):
    code = "deadline_exceeded"
    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 504


class CancelledError(TandemError):
    """The client cancelled the request or disconnected."""

    code = "cancelled"
    grpc_status = "CANCELLED"
    http_status = 499


class TransferError(TandemError):
    """A KV transfer was incomplete or stale, or did not match. The router starts another attempt."""

    code = "transfer_failed"
    grpc_status = "UNAVAILABLE"
    http_status = 503
    retryable = True


class StaleEpochError(TransferError):
    """The message belongs to an abandoned attempt, or to a lease that has ended."""

    code = "stale_epoch"
    grpc_status = "FAILED_PRECONDITION"


class IncompatiblePeerError(TandemError):
    """The KV formats of two instances differ."""

    code = "incompatible_peer"
    grpc_status = "FAILED_PRECONDITION"
    http_status = 503


class CheckpointError(TandemError):
    """A checkpoint that cannot be served: missing, damaged, unknown or unsafe."""

    code = "bad_checkpoint"
    grpc_status = "FAILED_PRECONDITION"


class ConfigError(TandemError):
    """A configuration file or flag that cannot be used."""

    code = "bad_config"
    grpc_status = "INVALID_ARGUMENT"


class InternalError(TandemError):
    """A fault in Tandem. The details are in the log, not in the message."""


def _with_subclasses(cls: type[TandemError]) -> list[type[TandemError]]:
    classes = [cls]
    for subclass in cls.__subclasses__():
        classes.extend(_with_subclasses(subclass))
    return classes


def error_from_code(code: str, message: str, param: str | None = None) -> TandemError:
    """The error of that `code`, as received from another process; an unknown code is an `InternalError`."""
    for cls in _with_subclasses(TandemError):
        if cls.code == code:
            return (InternalError if cls is TandemError else cls)(message, param=param)
    return InternalError(message, param=param)
