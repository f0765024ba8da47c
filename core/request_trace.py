"""Traces of requests, without the tracing library: values that pass through the router, and who makes them."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

Operation = Literal["chat", "text_completion"]
"""The kind of request, as OpenTelemetry's conventions for generative AI name it (gen_ai.operation.name)."""


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """A request that is traced: the ids of the span that stands for the whole call, a 128-bit and a 64-bit number."""

    trace_id: int
    span_id: int
    operation: Operation

    @property
    def traceparent(self) -> str:
        """The header that makes others' spans children of this one: https://www.w3.org/TR/trace-context/."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-01"


class CallTracer(Protocol):
    """Traces calls of the gRPC API."""

    def grpc_call(
        self, method: str, metadata: Mapping[str, str], operation: Operation
    ) -> AbstractContextManager[RequestTrace | None]:
        """The call runs inside of the context; an error that leaves it is the call's. None: it is not traced."""
        ...
