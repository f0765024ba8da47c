"""Samples a token from one row of logits on a CPU. `engine.sampler` defines the distribution.

A row fits into the inner caches and numpy calls are cheap, so that row by row is several times faster than a batch. One
thread sums segments of a fixed size with numpy, and torch only computes element by element: the result does not depend
on the batch or on the number of threads, to the last bit.
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

_SEGMENT = 512  # elements that are summed, or reduced to their maximum, before single elements are inspected
_LOWEST_TEMPERATURE = float(np.finfo(np.float32).tiny)  # float32 would divide by zero below


def allocate_scratch(vocab_size: int) -> _Floats:
    """float32 [2, vocab] for `draw` and `logprobs`, to be used for all rows of a batch: new memory for every row would
    take as long as the arithmetic."""
    return np.empty((2, vocab_size), np.float32)


def draw(row: Tensor, params: SamplingParams, noise: float, scratch: _Floats) -> int | None:
    """The token id that `noise` in [0, 1) selects from penalised float32 logits [vocab]; None if not finite."""
    logits: _Floats = row.numpy()
    best = int(logits.argmax())  # the first of the largest, or the first NaN
    highest = float(logits[best])
    if not math.isfinite(highest):
        return None
    if params.greedy:
        return best
    token_ids = _candidates(logits, highest, params)
    weights = _weights(logits if token_ids is None else logits[token_ids], highest, params.temperature, scratch[0])
    if params.top_p < 1.0:
        _clear_below(weights, _least_of_nucleus(weights, params.top_p, scratch[1]))
    sums = _segment_sums(weights)
    index = _index_at(noise * float(sums[-1]), weights, sums)
    return index if token_ids is None else int(token_ids[index])


def logprobs(row: Tensor, token_id: int, count: int, scratch: _Floats) -> TokenLogprob:
    """Log-probabilities of one token and of the `count` likeliest, from raw float32 logits [vocab]; NaN if those are
    not finite."""
    logits: _Floats = row.numpy()
    highest = float(logits.max())
    if not math.isfinite(highest):
        return TokenLogprob(token_id, math.nan)
    log_total = highest + math.log(_segment_sums(_weights(logits, highest, 1.0, scratch[0]))[-1])
    top: tuple[tuple[int, float], ...] = ()
    if count > 0:
        token_ids = _likeliest(logits, min(count, len(logits)))
        token_ids = token_ids[np.argsort(-logits[token_ids], kind="stable")[:count]]
        top = tuple((int(other), float(logits[other]) - log_total) for other in token_ids)
    return TokenLogprob(token_id, float(logits[token_id]) - log_total, top)


def _candidates(logits: _Floats, highest: float, params: SamplingParams) -> _Indices | None:
    """The token ids, ascending, that min_p and top_k keep; None means all."""
    least = highest + params.temperature * math.log(params.min_p) if params.min_p > 0.0 else -math.inf
    if 0 < params.top_k < len(logits):
        token_ids = _likeliest(logits, params.top_k)
        return token_ids[logits[token_ids] >= least]
    return np.flatnonzero(logits >= least) if params.min_p > 0.0 else None


def _likeliest(logits: _Floats, k: int) -> _Indices:
    """The token ids, ascending, of the `k` highest logits and of all logits that equal the lowest of those."""
    starts = _starts(logits)
    if k > len(starts):
        return np.flatnonzero(logits >= _kth_highest(logits, k))
    # The k-th highest maximum of a segment is a lower bound of the k-th highest logit.
    token_ids = np.flatnonzero(logits >= _kth_highest(np.maximum.reduceat(logits, starts), k))
    few = logits[token_ids]
    return token_ids[few >= _kth_highest(few, k)]


def _kth_highest(values: _Floats, k: int) -> np.float32:
    highest: np.float32 = np.partition(values, len(values) - k)[len(values) - k]
    return highest


def _weights(logits: _Floats, highest: float, temperature: float, scratch: _Floats) -> _Floats:
    """[len(logits)], proportional to the probabilities. Relative to the highest logit no temperature overflows."""
    weights = scratch[: len(logits)]
    with np.errstate(over="ignore"):
        np.subtract(logits, np.float32(highest), out=weights)
        if temperature != 1.0:
            weights /= np.float32(max(temperature, _LOWEST_TEMPERATURE))
    torch.from_numpy(weights).exp_()  # twice as fast as numpy's
    return weights


def _least_of_nucleus(weights: _Floats, top_p: float, scratch: _Floats) -> np.float32:
    """The weight of the token at which the sum of the likeliest reaches `top_p` of all."""
    if len(weights) > _SEGMENT:
        total = float(_segment_sums(weights)[-1])
        # A token below (1 - top_p) * total / n is outside of the nucleus: usually nearly all of a row. Half of that
        # bound allows for rounding.
        plausible = weights > 0.5 * (1.0 - top_p) * total / len(weights)
        if np.count_nonzero(plausible) < len(weights) // 8:
            weights = weights[np.flatnonzero(plausible)]
            top_p *= total / float(_segment_sums(weights)[-1])
    ranked = scratch[: len(weights)]
    ranked[:] = weights
    ranked.sort()
    sums = _segment_sums(ranked)
    least: np.float32 = ranked[_index_at((1.0 - top_p) * float(sums[-1]), ranked, sums)]
    return least


def _clear_below(weights: _Floats, least: np.float32) -> None:
    # Several times faster than a comparison and a choice.
    torch.threshold_(torch.from_numpy(weights), float(np.nextafter(least, np.float32(0.0))), 0.0)


def _index_at(target: float, weights: _Floats, sums: NDArray[np.float64]) -> int:
    """The first index at which the cumulative sum of `weights` exceeds `target`, or reaches the total if that is not
    above `target`. `sums` are the `_segment_sums`. For a `target` of at least 0 the weight at the index is above 0."""
    segment = _index_above(sums, target)
    begin = segment * _SEGMENT
    rest = target - float(sums[segment - 1]) if segment else target
    return begin + _index_above(weights[begin : begin + _SEGMENT].cumsum(dtype=np.float64), rest)


def _index_above(cumulative: NDArray[np.float64], target: float) -> int:
    below_end = math.nextafter(float(cumulative[-1]), 0.0)
    return int(cumulative.searchsorted(min(target, below_end), side="right"))


def _segment_sums(weights: _Floats) -> NDArray[np.float64]:
    """The cumulative sum at the end of each segment."""
    sums: _Floats = np.add.reduceat(weights, _starts(weights))
    return sums.cumsum(dtype=np.float64)


def _starts(values: _Floats) -> _Indices:
    return np.arange(0, len(values), _SEGMENT)
