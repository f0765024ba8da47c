"""Drawing from one row of logits on a CPU: see `engine.sampler` for what is drawn.

A row fits the innermost caches, and a call of numpy costs little, so rows one by one are several times faster than a
batch of them. Sums are numpy's, one thread each, over parts of a fixed size; what torch computes here is element by
element: neither the batch nor the number of threads changes a bit.
"""

import math
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.request import SamplingParams, TokenLogprob

_Floats: TypeAlias = NDArray[np.float32]

_PART = 256  # elements that are summed before anything is accumulated
_LOWEST_TEMPERATURE = float(np.finfo(np.float32).tiny)  # below it float32 would divide by zero


def draw(row: Tensor, params: SamplingParams, noise: float) -> int | None:
    """The token that `noise`, of [0, 1), means in penalised float32 logits [vocab]; None if they are not numbers."""
    logits: _Floats = row.numpy()
    best = int(logits.argmax())  # the first of the largest, or the first NaN
    highest = float(logits[best])
    if not math.isfinite(highest):
        return None
    if params.greedy:
        return best
    token_ids = None
    cutoff = _logit_cutoff(logits, highest, params)
    if cutoff > -math.inf:
        token_ids = np.flatnonzero(logits >= cutoff)
        row = torch.from_numpy(logits.take(token_ids))
    # Relative to the highest no temperature, however low, overflows; the likeliest token's weight is always 1.
    weights = row - highest
    if params.temperature != 1.0:
        weights.div_(max(params.temperature, _LOWEST_TEMPERATURE))
    weights.exp_()
    if params.top_p < 1.0:
        least = _least_of_nucleus(weights.numpy(), params.top_p)
        weights = torch.where(weights >= least, weights, 0.0)
    index = _invert(weights.numpy(), noise)
    return index if token_ids is None else int(token_ids[index])


def logprobs(row: Tensor, token_id: int, count: int) -> TokenLogprob:
    """Of one token, and of the `count` likeliest, of raw float32 logits [vocab]; NaN if they are not numbers."""
    logits: _Floats = row.numpy()
    highest = float(logits.max())
    if not math.isfinite(highest):
        return TokenLogprob(token_id, math.nan)
    log_total = highest + math.log(_part_sums((row - highest).exp_().numpy())[-1])
    top: tuple[tuple[int, float], ...] = ()
    if count > 0:
        token_ids = np.flatnonzero(logits >= _kth_highest(logits, count))
        likeliest = token_ids[np.argsort(-logits[token_ids], kind="stable")[:count]]
        top = tuple((int(other), float(logits[other]) - log_total) for other in likeliest)
    return TokenLogprob(token_id, float(logits[token_id]) - log_total, top)


def _logit_cutoff(logits: _Floats, highest: float, params: SamplingParams) -> float:
    """The lowest logit that min_p, then top_k, leave in the running."""
    cutoff = -math.inf
    if params.min_p > 0.0:
        cutoff = highest + params.temperature * math.log(params.min_p)
    if 0 < params.top_k < len(logits):
        cutoff = max(cutoff, _kth_highest(logits, params.top_k))
    return cutoff


def _kth_highest(logits: _Floats, k: int) -> float:
    place = max(len(logits) - k, 0)
    return float(np.partition(logits, place)[place])


def _least_of_nucleus(weights: _Floats, top_p: float) -> float:
    """The weight of the token at which the sum of the likeliest reaches `top_p` of all."""
    mass = top_p * _part_sums(weights)[-1]
    # Whatever is too little even if all the others were like it plays no part, and that is nearly all of a usual row.
    # Half of that, for rounding.
    plausible = weights > 0.5 * (1.0 - top_p) / top_p * mass / len(weights)
    if np.count_nonzero(plausible) < len(weights) // 8:
        weights = weights.take(np.flatnonzero(plausible))
    ranked = np.ascontiguousarray(np.sort(weights)[::-1])
    sums = _part_sums(ranked)
    part = min(int(sums.searchsorted(mass)), len(sums) - 1)
    candidates = ranked[part * _PART : (part + 1) * _PART]
    before = sums[part - 1] if part else 0.0
    last = int((before + candidates.cumsum(dtype=np.float64)).searchsorted(mass))
    return float(candidates[min(last, len(candidates) - 1)])


def _invert(weights: _Floats, noise: float) -> int:
    """The index at which the cumulative sum first exceeds `noise` of the total. It has a weight above 0."""
    part, noise = _step(_part_sums(weights), noise)
    begin = part * _PART
    return begin + _step(weights[begin : begin + _PART].cumsum(dtype=np.float64), noise)[0]


def _step(cumulative: NDArray[np.float64], noise: float) -> tuple[int, float]:
    """Where `cumulative` first exceeds `noise` of its end, and how far into that step this is, of [0, 1]."""
    total = float(cumulative[-1])
    target = min(noise * total, math.nextafter(total, 0.0))
    index = int(cumulative.searchsorted(target, side="right"))
    begin = float(cumulative[index - 1]) if index else 0.0
    return index, (target - begin) / (float(cumulative[index]) - begin)


def _part_sums(weights: _Floats) -> NDArray[np.float64]:
    """Cumulative sums at the ends of parts of `_PART` elements."""
    sums: _Floats = np.add.reduceat(weights, np.arange(0, len(weights), _PART))
    return sums.cumsum(dtype=np.float64)
