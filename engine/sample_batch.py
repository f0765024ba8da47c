"""Samples tokens for all rows at once in plain torch, for accelerators. `engine.sampler` defines the distribution."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tandem.core.request import SamplingParams, TokenLogprob


def draw(logits: Tensor, params: Sequence[SamplingParams], noise: Sequence[float]) -> list[int | None]:
    """The token id that `noise` in [0, 1) selects from each row of penalised float32 logits [n, vocab]; None for a row
    that is not finite."""
    # The maximum shows both faults: a NaN makes it NaN, and with an infinite maximum there is no softmax.
    valid = logits.amax(dim=-1).isfinite()
    logits = logits.masked_fill(~valid.unsqueeze(1), 0.0)
    token_ids = logits.argmax(dim=-1)
    random_rows = [row for row, p in enumerate(params) if not p.greedy]
    if random_rows:
        chosen = [params[row] for row in random_rows]
        token_ids[random_rows] = _draw_random(logits[random_rows], chosen, [noise[row] for row in random_rows])
    pairs = zip(token_ids.tolist(), valid.tolist(), strict=True)
    return [token_id if is_valid else None for token_id, is_valid in pairs]


def logprobs(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """Log-probabilities of one token per row of raw `logits` [n, vocab] and of the row's `counts` likeliest."""
    scores = torch.log_softmax(logits.float(), dim=-1)
    chosen = scores.gather(1, torch.tensor(token_ids, device=scores.device).unsqueeze(1)).squeeze(1).tolist()
    most = min(max(counts), scores.shape[1])
    if most == 0:
        return [TokenLogprob(token_id, score) for token_id, score in zip(token_ids, chosen, strict=True)]
    top_scores, top_ids = (part.tolist() for part in scores.topk(most, dim=-1))
    entries = []
    for row, (token_id, score, count) in enumerate(zip(token_ids, chosen, counts, strict=True)):
        ranked = sorted(zip(top_ids[row], top_scores[row], strict=True), key=lambda pair: (-pair[1], pair[0]))
        entries.append(TokenLogprob(token_id, score, tuple(ranked[:count])))
    return entries


def _draw_random(logits: Tensor, params: Sequence[SamplingParams], noise: Sequence[float]) -> Tensor:
    """int64 [n]: one token per row."""
    lowest = torch.finfo(logits.dtype).tiny  # smaller temperatures would divide by zero
    temperatures = _column([max(p.temperature, lowest) for p in params], logits)
    # Relative to the maximum no temperature overflows; the likeliest token's score is 0.
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures
    if any(p.min_p > 0.0 or p.top_k > 0 or p.top_p < 1.0 for p in params):
        scores = scores.masked_fill(scores < _cutoff(scores, params), -torch.inf)
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    totals = cumulative[:, -1:]
    # Below the total even after rounding, so that the selected token has a probability above 0.
    targets = torch.minimum(_column(noise, totals) * totals, torch.nextafter(totals, torch.zeros_like(totals)))
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1)


def _cutoff(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[n, 1]: the lowest score that min_p, then top_k, then top_p keep."""
    vocab = scores.shape[1]
    cutoff = _column([p.min_p for p in params], scores).log()
    if all(p.top_k == 0 and p.top_p >= 1.0 for p in params):
        return cutoff
    ranked = scores.sort(dim=-1, descending=True).values
    if any(p.top_k > 0 for p in params):
        kth = torch.tensor([min(p.top_k or vocab, vocab) - 1 for p in params], device=scores.device)
        cutoff = torch.maximum(cutoff, ranked.gather(1, kth.unsqueeze(1)))
    if any(p.top_p < 1.0 for p in params):
        kept = ranked.masked_fill(ranked < cutoff, -torch.inf)
        mass = kept.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        top_p = _column([p.top_p if p.top_p < 1.0 else torch.inf for p in params], mass)
        # The token that reaches the mass is the last that is kept.
        last = (mass < top_p).sum(dim=-1, keepdim=True).clamp(max=vocab - 1)
        cutoff = torch.maximum(cutoff, ranked.gather(1, last))
    return cutoff


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
