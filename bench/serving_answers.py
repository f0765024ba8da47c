"""What was seen of a cluster that was measured: its answers, and the steps of the prefill worker behind them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

from bench.load_result import LoadRecord
from tandem.core.config import PrefillSection

_BATCH_TOKENS = PrefillSection().max_batch_tokens


@dataclass(frozen=True, slots=True)
class Prompted:
    """An answer to a prompt: their lengths, what its client waited, and the parts of its timeline."""

    num_tokens: int  # of the prompt
    num_output_tokens: int
    began_s: float  # its step, on the client's clock
    first_s: float  # since it was sent
    whole_s: float
    ttft_s: float  # as the server has it
    total_s: float
    parts: Mapping[str, float]

    @classmethod
    def seen(
        cls, num_tokens: int, num_output_tokens: int, sent_s: float, first_s: float, last_s: float, timeline: Any
    ) -> "Prompted":
        """By a client, on its clock, with the server's `timeline` (docs/http-api.md)."""
        return cls(
            num_tokens=num_tokens,
            num_output_tokens=num_output_tokens,
            began_s=first_s - timeline["parts"]["prefill_s"],
            first_s=first_s - sent_s,
            whole_s=last_s - sent_s,
            ttft_s=timeline["ttft_s"],
            total_s=timeline["total_s"],
            parts=timeline["parts"],
        )

    @property
    def ended_s(self) -> float:
        return self.began_s + self.parts["prefill_s"]

    @property
    def arrived_s(self) -> float:
        """When decode had its KV. It got to know of it when its step of prefill began."""
        return self.ended_s + self.parts["transfer_s"]

    @property
    def num_steps(self) -> int:
        """Of decode."""
        return self.num_output_tokens - 1

    @property
    def kv_tokens(self) -> float:
        """That a step of decode reads, on average."""
        return self.num_tokens + self.num_output_tokens / 2

    @property
    def decode_span(self) -> tuple[float, float]:
        """From when its KV was there and a step could take it, to its end. Empty if the client saw both at once."""
        ready_s = self.arrived_s + self.parts["decode_queue_s"]
        return ready_s, max(ready_s, self.ended_s + self.whole_s - self.first_s)


def prompted_of(record: LoadRecord) -> Prompted | None:
    """None if the request was not answered in whole."""
    if not record.is_whole or record.timeline is None:
        return None
    assert record.sent_s is not None, "it is whole"
    assert record.first_s is not None
    assert record.last_s is not None
    return Prompted.seen(
        record.num_prompt_tokens,
        record.num_output_tokens,
        record.sent_s,
        record.first_s,
        record.last_s,
        record.timeline,
    )


@dataclass(frozen=True, slots=True)
class PrefillStep:
    """One step of the prefill worker, which had had nothing to do for `idle_s`: the prompts that were begun in it, and
    how many tokens it computed of each, the rest of the one that the step before left unfinished included."""

    prompts: tuple[Prompted, ...]
    lengths: tuple[int, ...]
    idle_s: float

    @property
    def began_s(self) -> float:
        return self.prompts[0].began_s

    @property
    def taken_s(self) -> float:
        return median(one.parts["prefill_s"] for one in self.prompts)

    @property
    def ended_s(self) -> float:
        return self.began_s + self.taken_s


@dataclass(frozen=True, slots=True)
class Loaded:
    """Answers of some clients, each of whom asked again at once and whose prompts are next to nothing, and what was
    prompted while they decoded."""

    decoded: tuple[Prompted, ...]
    prompted: tuple[Prompted, ...] = ()

    def steps(self) -> list[PrefillStep]:
        """Those with any of the prompts."""
        return steps_of(self.prompted, self.decoded)

    def decode_share(self, start_s: float, end_s: float) -> float:
        """Of the time between, in which there was somebody to decode for."""
        return _share([one.decode_span for one in (*self.decoded, *self.prompted)], start_s, end_s)

    def prefill_share(self, start_s: float, end_s: float) -> float:
        """Of the time between, in which a prompt was computed."""
        return _share([(one.began_s, one.ended_s) for one in (*self.decoded, *self.prompted)], start_s, end_s)

    @property
    def decode_step_s(self) -> float:
        """A mean step, as the answers saw it."""
        spans = [one.decode_span for one in self.decoded]
        return sum(end_s - start_s for start_s, end_s in spans) / sum(one.num_steps for one in self.decoded)


@dataclass(slots=True)
class Answers:
    """What was collected while the other worker had nothing to do, and while it was busy: with one prompt after
    another, with pauses between them, and with several at once, which are carried while decode computes."""

    prompted_alone: list[Prompted] = field(default_factory=list)
    decoded_alone: list[Loaded] = field(default_factory=list)
    steady: list[Loaded] = field(default_factory=list)
    paused: list[Loaded] = field(default_factory=list)
    crowded: list[Loaded] = field(default_factory=list)

    def add(self, other: "Answers") -> None:
        for one in fields(self):
            getattr(self, one.name).extend(getattr(other, one.name))

    @property
    def loaded(self) -> tuple[Loaded, ...]:
        return (*self.steady, *self.paused, *self.crowded)

    @property
    def is_enough(self) -> bool:
        """Whether there is something to fit with."""
        return any(one.prompted for one in self.steady) and any(one.prompted for one in self.crowded)


def steps_of(prompted: Sequence[Prompted], others: Sequence[Prompted] = ()) -> list[PrefillStep]:
    """The steps that computed the prompts, and `others` with them. One worker has one step at a time, so that prompts
    whose steps overlap were in one. Steps of others only make the worker busy."""
    asked = {id(one) for one in prompted}
    together: list[list[Prompted]] = []
    for one in sorted((*prompted, *others), key=lambda one: one.began_s):
        if together and _is_in(together[-1], one):
            together[-1].append(one)
        else:
            together.append([one])
    steps, ended_s, rest = list[PrefillStep](), float("-inf"), 0
    for members in together:
        lengths = [rest, *(one.num_tokens for one in sorted(members, key=lambda one: one.ended_s))]
        rest = max(0, sum(lengths) - _BATCH_TOKENS) if len(members) > 1 else 0
        lengths[-1] -= rest  # whoever was not finished with the others ended in the next step
        step = PrefillStep(
            tuple(members), tuple(n for n in lengths if n > 0), idle_s=max(0.0, members[0].began_s - ended_s)
        )
        ended_s = step.ended_s
        if any(id(one) in asked for one in members):
            steps.append(step)
    return steps


def _is_in(members: Sequence[Prompted], one: Prompted) -> bool:
    """Whether it was begun in the step of these: half of the step, or of what is known of it, was its own, too."""
    ended_s = min(other.ended_s for other in members)
    return ended_s - one.began_s > min(one.parts["prefill_s"], ended_s - members[0].began_s) / 2


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that do not overlap and cover the same time."""
    apart: list[tuple[float, float]] = []
    for start_s, end_s in sorted(spans):
        if apart and start_s <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(apart[-1][1], end_s))
        else:
            apart.append((start_s, end_s))
    return apart


def _share(spans: Sequence[tuple[float, float]], start_s: float, end_s: float) -> float:
    """Of the time between: that which any span covers."""
    covered_s = sum(
        max(0.0, min(end_s, span_end_s) - max(start_s, span_start_s)) for span_start_s, span_end_s in _union(spans)
    )
    return covered_s / (end_s - start_s)
