"""The spans inside of a traced call: one for each generation (choice), and in it one for each part of its timeline.

    POST /v1/chat/completions            router/tracing.py
      chat MODEL                         one for each choice; events: stages inside of parts, attempts
        admission                        the spans of `core.timeline.PARTS`: they follow each other without gaps
        dispatch
        prefill_queue
        prefill                          on the prefill instance
        transfer                         to the decode instance
        decode_queue
        second_token
        decode                           on the decode instance

Attributes are those of OpenTelemetry's semantic conventions for generative AI; what these do not have begins with
`tandem.`. No span has a prompt, an answer or a token.
"""

from typing import TYPE_CHECKING

from tandem.core.errors import TandemError
from tandem.core.timeline import PARTS, Stage
from tandem.router.records import COMPLETE, AttemptRecord, RequestRecord

if TYPE_CHECKING:
    from tandem.router.tracing import Attributes, Tracer

_STAGES_OF_PARTS = frozenset({Stage.RECEIVED, *(stage for stage, _ in PARTS)})
_ON_PREFILL = ("prefill_queue", "prefill")
_ON_DECODE = ("transfer", "decode_queue", "second_token", "decode")


class RequestSpans:
    """Exports the spans of requests when they end. A `RequestObserver`."""

    def __init__(self, tracer: "Tracer", model: str) -> None:
        self._tracer = tracer
        self._model = model

    def finished(self, record: RequestRecord) -> None:
        if record.trace is None:
            return
        tracer, timeline, epoch_ns = self._tracer, record.timeline, self._tracer.epoch_ns()
        context, call = tracer.child_of(record.trace)
        start_s = timeline.stamps[Stage.RECEIVED]
        tracer.export(
            f"{record.trace.operation} {self._model}",
            context,
            call,
            start_s,
            start_s + timeline.total_s,
            epoch_ns,
            self._attributes(record),
            events=_events(record),
            error_type=None if record.outcome in COMPLETE else record.outcome,
        )
        for name, part_start_s, part_end_s in timeline.intervals():
            name = name.removesuffix("_s")
            attributes = _part_attributes(record, name, part_end_s)
            tracer.export(name, tracer.child_context(context), context, part_start_s, part_end_s, epoch_ns, attributes)

    def refused(self, error: TandemError, record: RequestRecord | None = None) -> None:
        """Without a record the call's own span has the error."""
        if record is not None:
            self.finished(record)

    def _attributes(self, record: RequestRecord) -> "Attributes":
        timeline, sampling, trace = record.timeline, record.sampling, record.trace
        assert trace is not None
        assert sampling is not None, "a traced request has its sampling parameters"
        attributes: dict[str, str | int | float | tuple[str, ...]] = {
            "gen_ai.operation.name": trace.operation,
            "gen_ai.provider.name": "tandem",
            "gen_ai.request.model": self._model,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.seed": sampling.seed,
            "gen_ai.response.id": record.request_id,
            "gen_ai.response.model": self._model,
            "gen_ai.usage.input_tokens": timeline.num_prompt_tokens,
            "gen_ai.usage.output_tokens": timeline.num_output_tokens,
            "gen_ai.usage.cache_read.input_tokens": timeline.num_cached_tokens,
            "tandem.attempts": len(record.attempts),
            "tandem.slo.class": record.slo.name,
        }
        if record.outcome in COMPLETE:
            attributes["gen_ai.response.finish_reasons"] = (record.outcome,)
        if timeline.ttft_s is not None:
            attributes["gen_ai.response.time_to_first_chunk"] = timeline.ttft_s
        if timeline.tpot_s is not None:
            attributes["tandem.time_per_output_token"] = timeline.tpot_s
        if record.missed_targets is not None:
            attributes["tandem.slo.missed_targets"] = record.missed_targets
        if record.refused_because is not None:
            attributes["tandem.refused_because"] = record.refused_because
        return attributes


def _events(record: RequestRecord) -> list[tuple[str, float, "Attributes"]]:
    """Stages that overlap with parts, and the begin of each attempt where there were several."""
    events: list[tuple[str, float, Attributes]] = [
        (stage.value, at_s, {}) for stage, at_s in record.timeline.stamps.items() if stage not in _STAGES_OF_PARTS
    ]
    if len(record.attempts) > 1:
        for attempt in record.attempts:
            assert attempt.began_s is not None, "a traced request has the times of its attempts"
            attributes: dict[str, str | int] = {
                "tandem.attempt.epoch": attempt.epoch,
                "tandem.attempt.instance.id": attempt.prefill_id,
            }
            if attempt.failure is not None:
                attributes["error.type"] = attempt.failure
            events.append(("attempt", attempt.began_s, attributes))
    return sorted(events, key=lambda event: event[1])


def _part_attributes(record: RequestRecord, name: str, end_s: float) -> "Attributes":
    """Attributes with the instance on which that part ran."""
    attempt = _attempt_at(record, end_s)
    if attempt is None:
        return {}
    if name in _ON_PREFILL:
        cached = {"gen_ai.usage.cache_read.input_tokens": record.timeline.num_cached_tokens}
        return {"tandem.instance.id": attempt.prefill_id} | (cached if name == "prefill" else {})
    if name not in _ON_DECODE:
        return {}
    attributes: dict[str, str | int | float] = {
        "tandem.instance.id": attempt.prefill_id if attempt.decode_id is None else attempt.decode_id
    }
    if name == "transfer" and attempt.transport is not None:
        assert attempt.transfer_bytes is not None
        assert attempt.transfer_s is not None
        attributes["tandem.transfer.source.id"] = attempt.prefill_id
        attributes["tandem.transfer.transport"] = attempt.transport
        attributes["tandem.transfer.bytes"] = attempt.transfer_bytes
        attributes["tandem.transfer.streamed.bytes"] = attempt.streamed_bytes  # before the span
        attributes["tandem.transfer.duration"] = attempt.transfer_s
    return attributes


def _attempt_at(record: RequestRecord, at_s: float) -> AttemptRecord | None:
    """The last attempt that had begun before then."""
    begun = [each for each in record.attempts if each.began_s is not None and each.began_s < at_s]
    return begun[-1] if begun else None
