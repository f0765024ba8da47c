"""Traces: one span for each call of an API, exported by OTLP. `router/request_spans.py` has the spans inside of it.

Spans are made when what they describe is over, from timestamps that the router has anyway. Their times are the
router's: clocks of different machines are never compared. A request that is not sampled costs a random number.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tandem.core.clock import Clock
from tandem.core.errors import TandemError
from tandem.core.monitoring_config import TracingSection
from tandem.core.request_trace import Operation, RequestTrace

Attributes = Mapping[str, str | int | float | Sequence[str]]

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_SCOPE = InstrumentationScope("tandem")
_CLOSE_S = 3.0
_PROPAGATOR = TraceContextTextMapPropagator()


class CallSpan:
    """One call of an API, from its arrival until its response is sent. `request` is None if it is not sampled.
    `traceresponse` is the response's header of that name (W3C Trace Context level 2)."""

    def __init__(
        self,
        tracer: "Tracer",
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        operation: Operation,
        attributes: Attributes,
    ) -> None:
        self._tracer = tracer
        self._name = name
        self._context = context
        self._parent = parent
        self._attributes = attributes
        self._start_s = tracer.now_s()
        is_sampled = context.trace_flags.sampled
        self.request = RequestTrace(context.trace_id, context.span_id, operation) if is_sampled else None
        self.traceresponse = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(is_sampled):02x}"

    def end(self, attributes: Attributes, error_type: str | None = None) -> None:
        if self.request is not None:
            end_s = self._tracer.now_s()
            self._tracer.export(
                self._name,
                self._context,
                self._parent,
                self._start_s,
                end_s,
                self._tracer.epoch_ns(),
                {**self._attributes, **attributes},
                kind=SpanKind.SERVER,
                error_type=error_type,
            )


class Tracer:
    """Decides which calls are traced, and sends spans to the collector from a thread of its own. Implements
    `core.request_trace.CallTracer`. Spans that the collector does not take in time are dropped."""

    def __init__(
        self,
        settings: TracingSection,
        *,
        instance_id: str,
        clock: Clock,
        random: Random,
        wall_time_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`instance_id` is this router's."""
        self._clock = clock
        self._random = random
        self._wall_time_ns = wall_time_ns
        self._sampler = TraceIdRatioBased(settings.sample_ratio)
        self._resource = Resource.create({"service.name": "tandem-router", "service.instance.id": instance_id})
        self._processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.endpoint))

    def begin(self, name: str, headers: Mapping[str, str], operation: Operation, attributes: Attributes) -> CallSpan:
        """`headers` may have the client's traceparent and tracestate, whose decision to sample counts."""
        found = trace.get_current_span(_PROPAGATOR.extract(headers)).get_span_context()
        parent = found if found.is_valid else None
        if parent is not None:
            trace_id, is_sampled = parent.trace_id, bool(parent.trace_flags.sampled)
        else:
            trace_id = self._random.getrandbits(128) or 1
            result = self._sampler.should_sample(None, trace_id, name)
            is_sampled = result.decision is Decision.RECORD_AND_SAMPLE
        context = SpanContext(
            trace_id,
            self.new_span_id(),
            is_remote=False,
            trace_flags=_SAMPLED if is_sampled else TraceFlags(),
            trace_state=TraceState() if parent is None else parent.trace_state,
        )
        return CallSpan(self, name, context, parent, operation, attributes)

    @contextmanager
    def grpc_call(
        self, method: str, metadata: Mapping[str, str], operation: Operation
    ) -> Iterator[RequestTrace | None]:
        span = self.begin(method, metadata, operation, {"rpc.system.name": "grpc", "rpc.method": method})
        status, error_type = "OK", None
        try:
            yield span.request
        except TandemError as error:
            status, error_type = error.grpc_status, error.code
            raise
        except Exception as error:
            status, error_type = "INTERNAL", type(error).__qualname__
            raise
        except BaseException:  # the call is cancelled
            status, error_type = "CANCELLED", "cancelled"
            raise
        finally:
            span.end({"rpc.response.status_code": status}, error_type)

    # --- for spans ---------------------------------------------------------------------------------------------------

    def now_s(self) -> float:
        return self._clock.now_s()

    def epoch_ns(self) -> int:
        """Wall-clock time of the router clock's zero, in nanoseconds since 1970."""
        return self._wall_time_ns() - round(self._clock.now_s() * 1e9)

    def new_span_id(self) -> int:
        return self._random.getrandbits(64) or 1

    def export(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        start_s: float,
        end_s: float,
        epoch_ns: int,
        attributes: Attributes,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        events: Sequence[tuple[str, float, Attributes]] = (),
        error_type: str | None = None,
    ) -> None:
        """Queue a span that has ended. Times are on the router's clock, whose zero is at `epoch_ns`.

        A `ReadableSpan` is made directly: the span is over, and a recording span of the SDK takes ten times as long.
        """
        if error_type is not None:
            attributes = {**attributes, "error.type": error_type}
        span = ReadableSpan(
            name,
            context=context,
            parent=parent,
            resource=self._resource,
            attributes=attributes,
            events=tuple(Event(event, values, epoch_ns + round(at_s * 1e9)) for event, at_s, values in events),
            kind=kind,
            status=Status(StatusCode.UNSET if error_type is None else StatusCode.ERROR),
            start_time=epoch_ns + round(start_s * 1e9),
            end_time=epoch_ns + round(end_s * 1e9),
            instrumentation_scope=_SCOPE,
        )
        self._processor.on_end(span)

    def child_of(self, request: RequestTrace) -> tuple[SpanContext, SpanContext]:
        """A context for a new span below the call's, and the call's."""
        parent = SpanContext(request.trace_id, request.span_id, is_remote=False, trace_flags=_SAMPLED)
        return self.child_context(parent), parent

    def child_context(self, parent: SpanContext) -> SpanContext:
        return SpanContext(parent.trace_id, self.new_span_id(), is_remote=False, trace_flags=_SAMPLED)

    def close(self) -> None:
        """Send what is queued; blocks for a few seconds at most, whatever the collector does."""
        thread = threading.Thread(target=self._processor.shutdown, name="end of traces", daemon=True)
        thread.start()
        thread.join(_CLOSE_S)
