"""What was seen of a cluster that was measured: its answers, and the steps of the prefill worker behind them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

from bench.load_result import LoadRecord


@dataclass(frozen=True, slots=True)
class Prompted:
    """An answer to a prompt: its length, what its client waited, and the parts of its timeline."""

    num_tokens: int
    began_s: float  # its step, on the client's clock
    first_s: float  # since it was sent
    whole_s: float
    ttft_s: float  # as the server has it
    total_s: float
    parts: Mapping[str, float]

    @classmethod
    def seen(cls, num_tokens: int, sent_s: float, first_s: float, last_s: float, timeline: Any) -> "Prompted":
        """By a client, on its clock, with the server's `timeline` (docs/http-api.md)."""
        return cls(
            num_tokens=num_tokens,
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
    def decode_span(self) -> tuple[float, float]:
        """From when its KV was there and a step could take it, to its end. Empty if the client saw both at once."""
        ready_s = self.ended_s + self.parts["transfer_s"] + self.parts["decode_queue_s"]
        return ready_s, max(ready_s, self.ended_s + self.whole_s - self.first_s)


def prompted_of(record: LoadRecord) -> Prompted | None:
    """None if the request was not answered in whole."""
    if not record.is_whole or record.timeline is None:
        return None
    assert record.sent_s is not None, "it is whole"
    assert record.first_s is not None
    assert record.last_s is not None
    return Prompted.seen(record.num_prompt_tokens, record.sent_s, record.first_s, record.last_s, record.timeline)


@dataclass(frozen=True, slots=True)
class PrefillStep:
    """One step of the prefill worker, which had had nothing to do for `idle_s`."""

    prompts: tuple[Prompted, ...]
    idle_s: float

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(one.num_tokens for one in self.prompts)

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
class Decoded:
    """Answers of some clients, each of whom asks again at once; their prompts are next to nothing. `kv_tokens`: of
    one sequence, on average."""

    kv_tokens: float
    num_steps: int  # of all answers together
    prompted: tuple[Prompted, ...]

    @property
    def spans(self) -> list[tuple[float, float]]:
        """From when to when each answer had its steps."""
        return [one.decode_span for one in self.prompted]

    @property
    def step_s(self) -> float:
        """A mean step, as the answers saw it."""
        return self.seconds / self.num_steps

    @property
    def busy_s(self) -> float:
        """For how long there was anybody to decode for."""
        return sum(end_s - start_s for start_s, end_s in _union(self.spans))

    @property
    def seconds(self) -> float:
        """Of all answers together."""
        return sum(end_s - start_s for start_s, end_s in self.spans)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Prompts while others decoded."""

    prompted: tuple[Prompted, ...]
    decoded: Decoded

    @property
    def joined(self) -> list[tuple[float, float]]:
        """From when to when the prompts' answers had steps of decode, too."""
        return [one.decode_span for one in self.prompted]

    def steps(self) -> list[PrefillStep]:
        """Those with any of the prompts."""
        return steps_of(self.prompted, self.decoded.prompted)

    def decode_share(self, start_s: float, end_s: float) -> float:
        """Of the time between, in which there was somebody to decode for."""
        return _covered([*self.decoded.spans, *self.joined], start_s, end_s) / (end_s - start_s)

    @property
    def prefill_share(self) -> float:
        """Of the time in which decode was busy: that in which prefill was, too."""
        steps = [(one.began_s, one.ended_s) for one in (*self.prompted, *self.decoded.prompted)]
        both_s = sum(_covered(steps, start_s, end_s) for start_s, end_s in _union(self.decoded.spans))
        return both_s / self.decoded.busy_s


@dataclass(slots=True)
class Answers:
    """What was collected while the other worker had nothing to do, and while it was busy: with one prompt after
    another, with pauses between them, and with several at once, which are carried while decode computes."""

    prompted_alone: list[Prompted] = field(default_factory=list)
    decoded_alone: list[Decoded] = field(default_factory=list)
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
    whose steps overlap by half were in one. Steps of others only make the worker busy."""
    asked = {id(one) for one in prompted}
    together: list[list[Prompted]] = []
    for one in sorted((*prompted, *others), key=lambda one: one.began_s):
        if together and together[-1][0].ended_s - one.began_s > one.parts["prefill_s"] / 2:
            together[-1].append(one)
        else:
            together.append([one])
    steps, ended_s = list[PrefillStep](), float("-inf")
    for members in together:
        step = PrefillStep(tuple(members), idle_s=max(0.0, members[0].began_s - ended_s))
        ended_s = step.ended_s
        if any(id(one) in asked for one in members):
            steps.append(step)
    return steps


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that do not overlap and cover the same time."""
    apart: list[tuple[float, float]] = []
    for start_s, end_s in sorted(spans):
        if apart and start_s <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(apart[-1][1], end_s))
        else:
            apart.append((start_s, end_s))
    return apart


def _covered(spans: Sequence[tuple[float, float]], start_s: float, end_s: float) -> float:
    """How many of the seconds between any span covers."""
    return sum(
        max(0.0, min(end_s, span_end_s) - max(start_s, span_start_s)) for span_start_s, span_end_s in _union(spans)
    )
