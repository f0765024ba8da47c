"""What was measured of a running cluster: requests, and the prefill steps that computed their prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

from tandem.scheduling.budget import PREFILL_BATCH_TOKENS

_STEP_TOKENS = PREFILL_BATCH_TOKENS


@dataclass(frozen=True, slots=True)
class RequestSample:
    """One request: its lengths, the times that its client saw, and the server's timeline. Seconds."""

    num_prompt_tokens: int
    num_output_tokens: int
    prefill_began_s: float  # on the client's clock
    client_ttft_s: float
    client_total_s: float
    server_ttft_s: float
    server_total_s: float
    parts: Mapping[str, float]  # of the server's timeline

    @classmethod
    def from_timeline(
        cls, num_prompt_tokens: int, num_output_tokens: int, sent_s: float, first_s: float, last_s: float, timeline: Any
    ) -> "RequestSample":
        """`sent_s`, `first_s`, `last_s`: on the client's clock. `timeline`: the server's (docs/http-api.md)."""
        return cls(
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_output_tokens,
            prefill_began_s=first_s - timeline["parts"]["prefill_s"],
            client_ttft_s=first_s - sent_s,
            client_total_s=last_s - sent_s,
            server_ttft_s=timeline["ttft_s"],
            server_total_s=timeline["total_s"],
            parts=timeline["parts"],
        )

    @property
    def prefill_ended_s(self) -> float:
        return self.prefill_began_s + self.parts["prefill_s"]

    @property
    def kv_arrived_s(self) -> float:
        """When the decode worker had its KV. That worker admitted the request when its prefill step began. A colocated
        instance has no transfers."""
        return self.prefill_ended_s + self.parts.get("transfer_s", 0.0)

    @property
    def num_decode_steps(self) -> int:
        return self.num_output_tokens - 1

    @property
    def mean_kv_tokens(self) -> float:
        """KV tokens that a decode step reads of it, on average."""
        return self.num_prompt_tokens + self.num_output_tokens / 2

    @property
    def decode_span(self) -> tuple[float, float]:
        """(start, end): from when a decode step could include it to its last token. Empty if the client received all
        tokens at once."""
        ready_s = self.kv_arrived_s + self.parts.get("decode_queue_s", 0.0)
        return ready_s, max(ready_s, self.prefill_ended_s + self.client_total_s - self.client_ttft_s)


@dataclass(frozen=True, slots=True)
class PrefillStep:
    """One step of the prefill worker: `prompts` began in it, and `lengths` are the tokens computed of each, including
    the rest of a prompt that the previous step left unfinished. The worker was idle for `idle_s` before."""

    prompts: tuple[RequestSample, ...]
    lengths: tuple[int, ...]
    idle_s: float

    @property
    def began_s(self) -> float:
        return self.prompts[0].prefill_began_s

    @property
    def duration_s(self) -> float:
        return median(prompt.parts["prefill_s"] for prompt in self.prompts)

    @property
    def ended_s(self) -> float:
        return self.began_s + self.duration_s


@dataclass(frozen=True, slots=True)
class LoadPeriod:
    """A period of load. `decoding`: requests with tiny prompts, of clients that send the next one at once, so that the
    decode worker is busy, `batch` at a time. `prompted`: requests with few output tokens that were sent meanwhile."""

    decoding: tuple[RequestSample, ...]
    prompted: tuple[RequestSample, ...] = ()
    batch: int = 1

    def prefill_steps(self) -> list[PrefillStep]:
        """The steps with any of `prompted`."""
        return prefill_steps_of(self.prompted, self.decoding)

    def decode_share(self, start_s: float, end_s: float) -> float:
        """Share of the time from `start_s` to `end_s` during which a request was decoding."""
        return _covered_share([request.decode_span for request in (*self.decoding, *self.prompted)], start_s, end_s)

    def prefill_share(self, start_s: float, end_s: float) -> float:
        """Share of the time from `start_s` to `end_s` during which a prompt was computed."""
        requests = (*self.decoding, *self.prompted)
        spans = [(request.prefill_began_s, request.prefill_ended_s) for request in requests]
        return _covered_share(spans, start_s, end_s)

    @property
    def mean_decode_step_s(self) -> float:
        spans = [request.decode_span for request in self.decoding]
        num_steps = sum(request.num_decode_steps for request in self.decoding)
        return sum(end_s - start_s for start_s, end_s in spans) / num_steps


@dataclass(frozen=True, slots=True)
class ColocatedSamples:
    """Of one colocated instance: prompts that were sent one after the other, with pauses, and nothing else; and periods
    of decoding, in which a step also computes the tiny prompts of the next requests."""

    prompted: tuple[RequestSample, ...] = ()
    decoding: tuple[LoadPeriod, ...] = ()

    def __add__(self, other: "ColocatedSamples") -> "ColocatedSamples":
        return ColocatedSamples(self.prompted + other.prompted, self.decoding + other.decoding)


@dataclass(slots=True)
class ServingSamples:
    """All samples of a cluster. `prefill_alone`, `decode_alone`: the other worker was idle. Then both were busy:
    prefill with one prompt after another (`steady`), with pauses between prompts (`paused`), or with several prompts at
    once, whose KV is transferred while decode computes (`concurrent`)."""

    prefill_alone: list[RequestSample] = field(default_factory=list)
    decode_alone: list[LoadPeriod] = field(default_factory=list)
    steady: list[LoadPeriod] = field(default_factory=list)
    paused: list[LoadPeriod] = field(default_factory=list)
    concurrent: list[LoadPeriod] = field(default_factory=list)

    def add(self, other: "ServingSamples") -> None:
        for kind in fields(self):
            getattr(self, kind.name).extend(getattr(other, kind.name))

    @property
    def contended(self) -> tuple[LoadPeriod, ...]:
        return (*self.steady, *self.paused, *self.concurrent)

    @property
    def can_be_fitted(self) -> bool:
        return any(period.prompted for period in self.steady) and any(period.prompted for period in self.concurrent)


def prefill_steps_of(prompted: Sequence[RequestSample], others: Sequence[RequestSample] = ()) -> list[PrefillStep]:
    """The steps that computed any of `prompted`, together with the prompts of `others` in the same steps. A worker
    computes one step at a time, so prompts whose prefill times overlap were in one step. Steps with `others` alone only
    count as time during which the worker was not idle."""
    prompted_ids = {id(request) for request in prompted}
    groups: list[list[RequestSample]] = []
    for request in sorted((*prompted, *others), key=lambda request: request.prefill_began_s):
        if groups and _is_in_step(groups[-1], request):
            groups[-1].append(request)
        else:
            groups.append([request])
    steps, ended_s, rest = list[PrefillStep](), float("-inf"), 0
    for group in groups:
        by_end = sorted(group, key=lambda request: request.prefill_ended_s)
        lengths = [rest, *(request.num_prompt_tokens for request in by_end)]
        rest = max(0, sum(lengths) - _STEP_TOKENS) if len(group) > 1 else 0
        lengths[-1] -= rest  # the prompt that ended last was finished in the next step
        idle_s = max(0.0, group[0].prefill_began_s - ended_s)
        step = PrefillStep(tuple(group), tuple(length for length in lengths if length > 0), idle_s)
        ended_s = step.ended_s
        if any(id(request) in prompted_ids for request in group):
            steps.append(step)
    return steps


def _is_in_step(group: Sequence[RequestSample], request: RequestSample) -> bool:
    """Whether the request began in the group's step: at least half of its prefill time, or of the known time of the
    step, is common to both."""
    ended_s = min(member.prefill_ended_s for member in group)
    known_s = ended_s - group[0].prefill_began_s
    return ended_s - request.prefill_began_s > min(request.parts["prefill_s"], known_s) / 2


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans that cover the same time and do not overlap."""
    disjoint: list[tuple[float, float]] = []
    for start_s, end_s in sorted(spans):
        if disjoint and start_s <= disjoint[-1][1]:
            disjoint[-1] = (disjoint[-1][0], max(disjoint[-1][1], end_s))
        else:
            disjoint.append((start_s, end_s))
    return disjoint


def _covered_share(spans: Sequence[tuple[float, float]], start_s: float, end_s: float) -> float:
    """Share of the time from `start_s` to `end_s` that any span covers."""
    covered_s = sum(
        max(0.0, min(end_s, span_end_s) - max(start_s, span_start_s)) for span_start_s, span_end_s in _union(spans)
    )
    return covered_s / (end_s - start_s)
