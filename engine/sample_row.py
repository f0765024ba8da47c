"""Drawing from one row of logits on a CPU: see `engine.sampler` for what is drawn.

A row fits the innermost caches, and a call of numpy costs little, so rows one by one are several times faster than a
batch of them. Sums are numpy's, by one thread, over parts of a fixed size; what torch computes here is element by
element: neither the batch nor the number of threads changes a bit.
"""

import math
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.core.request import SamplingParams, TokenLogprob

_Floats: TypeAlias = NDArray[np.float32]
_Indices: TypeAlias = NDArray[np.int64]

_PART = 512  # consecutive elements that are looked at together before any single one
_LOWEST_TEMPERATURE = float(np.finfo(np.float32).tiny)  # below it float32 would divide by zero


def scratch(vocab_size: int) -> _Floats:
    """Room for the two rows that `draw` and `logprobs` write, made once for a batch: fresh memory for every row would
    cost as much as what is computed in it."""
    return np.empty((2, vocab_size), np.float32)


def draw(row: Tensor, params: SamplingParams, noise: float, room: _Floats) -> int | None:
    """The token that `noise`, of [0, 1), means in penalised float32 logits [vocab]; None if they are not numbers."""
    logits: _Floats = row.numpy()
    best = int(logits.argmax())  # the first of the largest, or the first NaN
    highest = float(logits[best])
    if not math.isfinite(highest):
        return None
    if params.greedy:
        return best
    token_ids = _candidates(logits, highest, params)
    weights = _weights(logits if token_ids is None else logits[token_ids], highest, params.temperature, room[0])
    if params.top_p < 1.0:
        _clear_below(weights, _least_of_nucleus(weights, params.top_p, room[1]))
    sums = _part_sums(weights)
    index = _index_at(noise * float(sums[-1]), weights, sums)
    return index if token_ids is None else int(token_ids[index])


def logprobs(row: Tensor, token_id: int, count: int, room: _Floats) -> TokenLogprob:
    """Of one token, and of the `count` likeliest, of raw float32 logits [vocab]; NaN if they are not numbers."""
    logits: _Floats = row.numpy()
    highest = float(logits.max())
    if not math.isfinite(highest):
        return TokenLogprob(token_id, math.nan)
    log_total = highest + math.log(_part_sums(_weights(logits, highest, 1.0, room[0]))[-1])
    top: tuple[tuple[int, float], ...] = ()
    if count > 0:
        token_ids = _likeliest(logits, min(count, len(logits)))
        token_ids = token_ids[np.argsort(-logits[token_ids], kind="stable")[:count]]
        top = tuple((int(other), float(logits[other]) - log_total) for other in token_ids)
    return TokenLogprob(token_id, float(logits[token_id]) - log_total, top)


def _candidates(logits: _Floats, highest: float, params: SamplingParams) -> _Indices | None:
    """The tokens, in order, that min_p and top_k leave in the running; None: all."""
    least = highest + params.temperature * math.log(params.min_p) if params.min_p > 0.0 else -math.inf
    if 0 < params.top_k < len(logits):
        token_ids = _likeliest(logits, params.top_k)
        return token_ids[logits[token_ids] >= least]
    return np.flatnonzero(logits >= least) if params.min_p > 0.0 else None


def _likeliest(logits: _Floats, k: int) -> _Indices:
    """The tokens, in order, of the `k` highest logits, and all that equal the lowest of these."""
    starts = _starts(logits)
    if k > len(starts):
        return np.flatnonzero(logits >= _kth_highest(logits, k))
    # `k` parts have one at least so high each, so the lowest wanted one is not lower.
    token_ids = np.flatnonzero(logits >= _kth_highest(np.maximum.reduceat(logits, starts), k))
    few = logits[token_ids]
    return token_ids[few >= _kth_highest(few, k)]


def _kth_highest(values: _Floats, k: int) -> np.float32:
    highest: np.float32 = np.partition(values, len(values) - k)[len(values) - k]
    return highest


def _weights(logits: _Floats, highest: float, temperature: float, room: _Floats) -> _Floats:
    """Proportional to the probabilities. Relative to the highest no temperature, however low, overflows."""
    weights = room[: len(logits)]
    with np.errstate(over="ignore"):
        np.subtract(logits, np.float32(highest), out=weights)
        if temperature != 1.0:
            weights /= np.float32(max(temperature, _LOWEST_TEMPERATURE))
    torch.from_numpy(weights).exp_()  # twice as fast as numpy's
    return weights


def _least_of_nucleus(weights: _Floats, top_p: float, room: _Floats) -> np.float32:
    """The weight of the token at which the sum of the likeliest reaches `top_p` of all."""
    if len(weights) > _PART:
        total = float(_part_sums(weights)[-1])
        # Whatever is too little even if all the others were like it plays no part: nearly all of a usual row. Half of
        # that, for rounding.
        plausible = weights > 0.5 * (1.0 - top_p) * total / len(weights)
        if np.count_nonzero(plausible) < len(weights) // 8:
            weights = weights[np.flatnonzero(plausible)]
            top_p *= total / float(_part_sums(weights)[-1])
    ranked = room[: len(weights)]
    ranked[:] = weights
    ranked.sort()
    sums = _part_sums(ranked)
    least: np.float32 = ranked[_index_at((1.0 - top_p) * float(sums[-1]), ranked, sums)]
    return least


def _clear_below(weights: _Floats, least: np.float32) -> None:
    # Several times faster than a comparison and a choice.
    torch.threshold_(torch.from_numpy(weights), float(np.nextafter(least, np.float32(0.0))), 0.0)


def _index_at(target: float, weights: _Floats, sums: NDArray[np.float64]) -> int:
    """Where the cumulative sum of `weights`, whose `_part_sums` are `sums`, first exceeds `target`; where it reaches
    its end if that is below. Unless `target` is negative the weight there is above 0."""
    part = _step(sums, target)
    begin = part * _PART
    rest = target - float(sums[part - 1]) if part else target
    return begin + _step(weights[begin : begin + _PART].cumsum(dtype=np.float64), rest)


def _step(cumulative: NDArray[np.float64], target: float) -> int:
    below_end = math.nextafter(float(cumulative[-1]), 0.0)
    return int(cumulative.searchsorted(min(target, below_end), side="right"))


def _part_sums(weights: _Floats) -> NDArray[np.float64]:
    """The cumulative sum at the end of each part."""
    sums: _Floats = np.add.reduceat(weights, _starts(weights))
    return sums.cumsum(dtype=np.float64)


def _starts(values: _Floats) -> _Indices:
    return np.arange(0, len(values), _PART)
