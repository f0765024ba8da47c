"""Upper bounds of the rate of one instance for any scheduler, from the cost model without simulation.

Prefill and colocated: the time of the fullest steps. Decode: Little's law. A batch of b sequences that each take n
steps of t(b) seconds serves b / (n t(b)) requests per second; KV memory and t(b) <= TPOT bound b. The limit of a kind
that misses a target without load is 0. Looser targets never lower a limit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tandem.core.cost_model import StepLoad, attention_pairs
from tandem.core.slo import SloClass
from tandem.placement.search.kinds import InstanceKind, resident_tokens
from tandem.placement.workload.requests import RequestStream

# TPOT is the mean over a request's steps, and a share of the requests may miss it: mean steps can be slightly slower
# than the target.
_TPOT_MARGIN = 1.15
_SAMPLE = 512


@dataclass(frozen=True, slots=True)
class RateLimit:
    """`rate`: requests per second of one instance, 0 if it cannot meet the targets; of the workload to which the stream
    belongs, see `RequestStream.load`. `reason` names the bound."""

    rate: float
    reason: str


KindLimits = Mapping[InstanceKind, RateLimit]


def limits_of_variants(limits: KindLimits, change: Callable[[InstanceKind], InstanceKind]) -> KindLimits:
    """Of the kinds that `change` makes of those with a limit above 0: the highest limit of these."""
    found: dict[InstanceKind, RateLimit] = {}
    for kind, limit in limits.items():
        variant = change(kind)
        if variant not in limits and limit.rate > max(0.0, found[variant].rate if variant in found else 0.0):
            found[variant] = limit
    return found


def limit_of(kind: InstanceKind, classes: Sequence[SloClass], stream: RequestStream) -> RateLimit:
    limit = _limit_of(kind, classes, stream.head(_SAMPLE))
    return RateLimit(limit.rate / stream.load, limit.reason)


def _limit_of(kind: InstanceKind, classes: Sequence[SloClass], sample: RequestStream) -> RateLimit:
    """In requests per second of the stream itself."""
    match kind.role:
        case "prefill":
            return _ttft_limit(kind, classes, sample) or RateLimit(_prefill_rate(kind, sample), "prompt tokens/s")
        case "decode":
            return _decode_limit(kind, classes, sample, with_prompts=False)
        case "colocated":
            return _ttft_limit(kind, classes, sample) or _decode_limit(kind, classes, sample, with_prompts=True)


def _prefill_rate(kind: InstanceKind, stream: RequestStream) -> float:
    """Requests per second of one instance with full steps and long prompts in chunks."""
    time_s, budget = 0.0, kind.max_batch_tokens
    chunks: list[tuple[int, int]] = []
    for length in stream.prompt_tokens.tolist():
        start = 0
        while start < length:
            count = min(budget, length - start)
            chunks.append((start, count))
            start, budget = start + count, budget - count
            if budget == 0:
                time_s += _interval_s(kind, chunks)
                chunks, budget = [], kind.max_batch_tokens
    if chunks:  # the last step counts by the used share of its budget
        time_s += _interval_s(kind, chunks) * (1 - budget / kind.max_batch_tokens)
    return len(stream) / time_s


def _decode_rates(kind: InstanceKind, stream: RequestStream, *, with_prompts: bool) -> list[tuple[int, float, float]]:
    """(batch, step_s, requests per second of one instance) for batches up to `max_batch`.

    With prompts, each step also computes the prompt tokens that keep the batch size constant.
    """
    steps = float((stream.output_tokens - 1).mean())
    resident = resident_tokens(stream)
    prompt = float(stream.prompt_tokens.mean())
    attended = float((stream.prompt_tokens**2).sum() / stream.prompt_tokens.sum()) / 2
    batch, rates = 1.0, []
    while int(batch) <= kind.max_batch:
        sequences = int(batch)
        prompt_tokens = round(sequences * prompt / max(steps, 1.0)) if with_prompts else 0
        load = StepLoad(
            prefill_tokens=prompt_tokens,
            prefill_sequences=1 if prompt_tokens else 0,
            prefill_pairs=round(prompt_tokens * attended),
            prefill_kv_tokens=round(2 * attended) if prompt_tokens else 0,
            decode_sequences=sequences,
            decode_kv_tokens=round(sequences * resident),
            sampled=sequences,
        )
        fits = prompt_tokens + sequences <= kind.max_batch_tokens or kind.policy == "prompt_first"
        if not with_prompts or fits:
            step_s = kind.cost.step(load).total_s
            rates.append((sequences, step_s, sequences / (max(steps, 1e-9) * step_s)))
        batch = max(batch + 1, batch * 1.05)
    return rates


def _ttft_limit(kind: InstanceKind, classes: Sequence[SloClass], stream: RequestStream) -> RateLimit | None:
    """A limit of 0 if too many prompts take longer than their TTFT target without load. Longer prompts take longer."""
    for index, slo in enumerate(classes):
        lengths = np.sort(stream.prompt_tokens[stream.slo_class == index])
        if len(lengths) == 0:
            continue
        decisive = int(lengths[max(0, math.ceil(slo.attainment * len(lengths) - 1e-9) - 1)])
        reached_s = kind.cost.step(StepLoad.of_prompts(decisive)).total_s
        if reached_s > slo.ttft_s:
            return RateLimit(
                0.0,
                f"without load, TTFT of class {slo.name} is {reached_s:.3g} s at its attainment, over {slo.ttft_s:g} s",
            )
    return None


def _decode_limit(
    kind: InstanceKind, classes: Sequence[SloClass], stream: RequestStream, *, with_prompts: bool
) -> RateLimit:
    tightest = min(classes, key=lambda slo: slo.tpot_s)
    alone_s = kind.cost.step(StepLoad.of_decode(1, round(resident_tokens(stream)))).total_s
    if alone_s > tightest.tpot_s * _TPOT_MARGIN:
        return RateLimit(
            0.0, f"without load, TPOT is {alone_s:.3g} s, over {tightest.tpot_s:g} s of class {tightest.name}"
        )
    rates = _decode_rates(kind, stream, with_prompts=with_prompts)
    allowed = [(rate, batch) for batch, step_s, rate in rates if step_s <= tightest.tpot_s * _TPOT_MARGIN]
    if not allowed:
        return RateLimit(0.0, f"no batch keeps TPOT within {tightest.tpot_s:g} s")
    rate, batch = max(allowed)
    if batch < rates[-1][0]:
        return RateLimit(rate, f"TPOT, {batch} sequences")
    is_full = kind.kv_tokens < (kind.max_batch + 1) * resident_tokens(stream)
    return RateLimit(rate, f"KV memory, {batch} sequences" if is_full else f"the largest batch, {batch} sequences")


def _interval_s(kind: InstanceKind, chunks: list[tuple[int, int]]) -> float:
    return kind.cost.step(
        StepLoad(
            prefill_tokens=sum(count for _, count in chunks),
            prefill_sequences=len(chunks),
            prefill_pairs=sum(attention_pairs(start, count) for start, count in chunks),
            prefill_kv_tokens=sum(start + count for start, count in chunks),
            sampled=len(chunks),
        )
    ).interval_s
