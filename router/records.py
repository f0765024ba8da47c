"""The record of each request that has ended: for the log, for metrics and for the explanation of its routing."""

import json
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from tandem.core.errors import (
    CancelledError,
    ContextLengthError,
    DuplicateRequestError,
    InvalidRequestError,
    TandemError,
)
from tandem.core.log_lines import LogFields, about
from tandem.core.request import FinishReason, SamplingParams
from tandem.core.request_slo import NO_SLO, RequestSlo
from tandem.core.request_trace import RequestTrace
from tandem.core.timeline import Timeline
from tandem.router.token_gaps import TokenGaps
from tandem.scheduling.routing import Selection

logger = logging.getLogger(__name__)

_EXPLAINED_ATTEMPTS = 3  # in a header, the last ones
_EXPLAINED_CANDIDATES = 4  # of each choice

COMPLETE = (FinishReason.STOP.value, FinishReason.LENGTH.value)
_CLIENTS_DOING = (
    CancelledError.code,
    InvalidRequestError.code,
    ContextLengthError.code,
    DuplicateRequestError.code,
)


@dataclass(slots=True)
class AttemptRecord:
    """Filled while the attempt runs. `failure` is an error code, None for the attempt that ended the request well.
    `has_both_phases`: the instance that computed the prompt decodes, too. `began_s` is on the router's clock, and
    None where the request is not traced."""

    epoch: int
    prefill_id: str
    prefill_selection: Selection
    has_both_phases: bool = False
    decode_id: str | None = None
    decode_selection: Selection | None = None
    transport: str | None = None
    transfer_s: float | None = None
    transfer_bytes: int | None = None
    streamed_bytes: int = 0
    failure: str | None = None
    began_s: float | None = None

    def selections(self) -> list[tuple[str, Selection]]:
        """Pairs (phase, selection) of the decisions for the attempt so far."""
        found = [("both phases" if self.has_both_phases else "prefill", self.prefill_selection)]
        return found if self.decode_selection is None else [*found, ("decode", self.decode_selection)]


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request that is over, or was not accepted. `outcome` is a finish reason's value or an error's code. Holds no
    text and no tokens. `predicted_ttft_s` is what the router expected when it came, `demoted_because` why it became
    best effort, `refused_because` the reason of an OverloadedError. `tenant` is whom it counted to while it waited: a
    name, or without API keys an address. `sampling` is kept where there is a `trace`."""

    request_id: str
    outcome: str
    message: str | None
    timeline: Timeline
    attempts: tuple[AttemptRecord, ...]
    slo: RequestSlo = NO_SLO
    token_gaps: TokenGaps = field(default_factory=TokenGaps)
    predicted_ttft_s: float | None = None
    demoted_because: str | None = None
    refused_because: str | None = None
    tenant: str = ""
    trace: RequestTrace | None = None
    sampling: SamplingParams | None = None

    @property
    def missed_targets(self) -> tuple[str, ...] | None:
        """Missed targets: "ttft", "tpot". A failed request has missed all its targets. None: the request does not
        count, because it had no targets, or because its client has ended it."""
        if not self.slo.has_targets or self.outcome in _CLIENTS_DOING:
            return None
        timeline = self.timeline
        if timeline.ttft_s is None or self.outcome not in COMPLETE:
            return self.slo.targets
        return self.slo.missed(timeline.ttft_s, timeline.tpot_s or 0.0)

    def summary(self) -> str:
        """One line for a person."""
        timeline = self.timeline
        cached = f" ({timeline.num_cached_tokens} cached)" if timeline.num_cached_tokens else ""
        attempts = f", {len(self.attempts)} attempts" if len(self.attempts) > 1 else ""
        return (
            f"{self.request_id!r}: {self.outcome}, {timeline.num_prompt_tokens}{cached} + {timeline.num_output_tokens} "
            f"tokens in {_milliseconds(timeline.total_s)}, TTFT {_milliseconds(timeline.ttft_s)}, "
            f"TPOT {_milliseconds(timeline.tpot_s)}{attempts}"
        )

    def describe_slo(self) -> str:
        """One line about its targets for a person, such as "SLO class chat: TTFT 12.0 of 500.0 ms, met"."""
        missed, timeline, slo = self.missed_targets, self.timeline, self.slo
        results = []
        for name, target_s, actual_s in (("ttft", slo.ttft_s, timeline.ttft_s), ("tpot", slo.tpot_s, timeline.tpot_s)):
            if target_s < math.inf:
                verdict = "" if missed is None else ", missed" if name in missed else ", met"
                results.append(f"{name.upper()} {_milliseconds(actual_s)} of {_milliseconds(target_s)}{verdict}")
        return f"SLO class {slo.name}: {'; '.join(results)}"

    def fields(self) -> dict[str, Any]:
        """For one structured log line."""
        timeline = self.timeline
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "outcome": self.outcome,
            "prompt_tokens": timeline.num_prompt_tokens,
            "cached_tokens": timeline.num_cached_tokens,
            "output_tokens": timeline.num_output_tokens,
            "total_s": _rounded(timeline.total_s),
            "ttft_s": _rounded(timeline.ttft_s),
            "tpot_s": _rounded(timeline.tpot_s),
            "attempts": len(self.attempts),
            "instances": [[attempt.prefill_id, attempt.decode_id] for attempt in self.attempts],
            "failures": [attempt.failure for attempt in self.attempts if attempt.failure],
            "parts": {name: _rounded(part_s) for name, part_s in timeline.parts().items()},
        }
        if self.refused_because is not None:
            fields["refused_because"] = self.refused_because
        if self.slo.has_targets:
            fields["slo_class"], fields["missed_targets"] = self.slo.name, self.missed_targets
            fields["predicted_ttft_s"] = _rounded(self.predicted_ttft_s)
            fields["is_demoted"] = self.demoted_because is not None
        if self.message is not None:
            fields["reason"] = self.message
        if self.trace is not None:
            fields["trace_id"] = f"{self.trace.trace_id:032x}"
        return fields


def explanation(attempts: Sequence[AttemptRecord]) -> str:
    """The selections of the attempts as one line of JSON in ASCII, short enough for a header."""
    choices = [
        {"attempt": number, "phase": phase, "instance": selection.instance_id, **_comparison(selection)}
        for number, attempt, selections in _numbered(attempts)[-_EXPLAINED_ATTEMPTS:]
        for phase, selection in selections
    ]
    return json.dumps(choices, separators=(",", ":"))


def _numbered(attempts: Sequence[AttemptRecord]) -> list[tuple[int, AttemptRecord, list[tuple[str, Selection]]]]:
    """Each attempt with its number, from 1 on, and what was decided for it. For one that reads the KV of the attempt
    before, no other prefill instance was selected."""
    found = []
    for number, attempt in enumerate(attempts, start=1):
        selections = attempt.selections()
        if number > 1 and attempts[number - 2].epoch == attempt.epoch:
            selections = [(phase, selection) for phase, selection in selections if phase == "decode"]
        found.append((number, attempt, selections))
    return found


def _comparison(selection: Selection) -> dict[str, Any]:
    shown = selection.candidates[:_EXPLAINED_CANDIDATES]
    candidates = [
        {
            "instance": candidate.instance_id,
            "score": None if candidate.score is None else round(candidate.score, 4),
            **dict(candidate.terms),
            "reason": candidate.reason or "chosen",
        }
        for candidate in shown
    ]
    return {"candidates": candidates, "others": selection.others + len(selection.candidates) - len(shown)}


class RequestObserver(Protocol):
    """Hears of every request once, when it is over."""

    def finished(self, record: RequestRecord) -> None: ...

    def refused(self, error: TandemError, record: RequestRecord | None = None) -> None:
        """The request was refused. `record` None: it was refused before its prompt was tokenized."""
        ...


class RequestLog:
    """Writes one line per request, and remembers the last `capacity` of them.

    `early_refusals` counts, by error code, the requests that were refused before they got as far as token ids.
    """

    def __init__(self, capacity: int = 2048) -> None:
        self.early_refusals: Counter[str] = Counter()
        self._capacity = capacity
        self._records: OrderedDict[str, RequestRecord] = OrderedDict()

    def finished(self, record: RequestRecord) -> None:
        self._keep(record)
        if logger.isEnabledFor(logging.INFO):
            logger.info("request %s", LogFields(record.fields()))

    def refused(self, error: TandemError, record: RequestRecord | None = None) -> None:
        extra = None if record is None else about(record.request_id)
        logger.info("request refused: %s: %s", error.code, error.message, extra=extra)
        if record is None:
            self.early_refusals[error.code] += 1
        else:
            self._keep(record)

    def _keep(self, record: RequestRecord) -> None:
        self._records.pop(record.request_id, None)
        self._records[record.request_id] = record
        if len(self._records) > self._capacity:
            self._records.popitem(last=False)

    def find(self, request_id: str) -> RequestRecord | None:
        """The last request of that id, if it is still remembered."""
        return self._records.get(request_id)

    def latest(self, count: int) -> list[RequestRecord]:
        """The last requests, newest first."""
        return [self._records[request_id] for request_id in islice(reversed(self._records), count)]

    def explain(self, request_id: str) -> str:
        """The request's outcome, timeline and routing decisions as text; empty if the log does not have it."""
        record = self._records.get(request_id)
        if record is None:
            return ""
        lines = [record.summary()]
        if record.message is not None:
            lines.append(f"  {record.message}")
        if record.slo.has_targets:
            lines.append(f"  {record.describe_slo()}")
        if record.predicted_ttft_s is not None:
            actual_s = record.timeline.ttft_s
            actual = "" if actual_s is None else f", actual {_milliseconds(actual_s)}"
            lines.append(f"  predicted TTFT {_milliseconds(record.predicted_ttft_s)}{actual}")
        if record.demoted_because is not None:
            lines.append(f"  best effort: {record.demoted_because}")
        if record.refused_because is not None:
            lines.append(f"  refused: {record.refused_because}")
        parts = record.timeline.parts().items()
        lines += [f"  {name.removesuffix('_s'):14} {_milliseconds(part_s)}" for name, part_s in parts]
        for number, attempt, selections in _numbered(record.attempts):
            for phase, selection in selections:
                lines.append(f"attempt {number}, {phase} on {selection.instance_id}:")
                lines.extend(f"  {line}" for line in selection.explain().splitlines())
            if attempt.failure is not None:
                lines.append(f"attempt {number} failed: {attempt.failure}")
        return "\n".join(lines)


def _milliseconds(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s * 1e3:.1f} ms"


def _rounded(value_s: float | None) -> float | None:
    return None if value_s is None else round(value_s, 6)
