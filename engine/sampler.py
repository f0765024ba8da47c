"""From logits to tokens.

The order is vLLM's: penalties, temperature, min_p, top_k, top_p. Reported log-probabilities are those of the model
itself, log_softmax of the raw logits before all of these, as OpenAI and vLLM report them.

What a row draws depends on its own logits and its (seed, position) alone. Candidates are cut off at a score, so that
equal tokens stay or go together, and one is drawn by inverting the cumulative distribution in the order of token ids:
no step depends on how a sort breaks ties. Greedy takes the lowest id among equals.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from core.errors import InternalError
from core.request import SampledToken, SamplingParams, TokenLogprob
from engine.noise import uniform
from engine.step import SampleRequest


def sample(logits: Tensor, requests: Sequence[SampleRequest]) -> list[SampledToken | InternalError]:
    """Draw one token per row of float32 `logits` [n, vocab]. A row whose logits are not numbers gets an error."""
    token_ids, valid = _draw(logits, requests)
    results: list[SampledToken | InternalError] = [SampledToken(token_id) for token_id in token_ids]
    reported = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
    if reported:
        counts = [requests[row].params.logprobs or 0 for row in reported]
        entries = logprobs(logits[reported], [token_ids[row] for row in reported], counts)
        for row, entry in zip(reported, entries, strict=True):
            results[row] = SampledToken(token_ids[row], entry)
    for row, is_valid in enumerate(valid):
        if not is_valid:
            results[row] = not_a_number()
    return results


def not_a_number() -> InternalError:
    return InternalError("The model's output for this request is not a number")


def logprobs(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """The log-probability of one token per row of raw `logits` [n, vocab], and of the row's `counts` likeliest."""
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


def _draw(logits: Tensor, requests: Sequence[SampleRequest]) -> tuple[list[int], list[bool]]:
    """Token ids, and whether each row was usable."""
    if any(_has_penalties(request.params) for request in requests):
        logits = _penalised(logits, requests)
    # A NaN makes the maximum NaN, and an infinite one has no softmax: one look at it tells both.
    valid = logits.amax(dim=-1).isfinite()
    if not valid.all():
        logits = logits.masked_fill(~valid.unsqueeze(1), 0.0)
    random_rows = [row for row, request in enumerate(requests) if not request.params.greedy]
    if len(random_rows) == len(requests):
        token_ids = _draw_random(logits, requests)
    else:
        token_ids = _argmax(logits)
        if random_rows:
            token_ids[random_rows] = _draw_random(logits[random_rows], [requests[row] for row in random_rows])
    return token_ids.tolist(), valid.tolist()


def _has_penalties(params: SamplingParams) -> bool:
    return (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) != (0.0, 0.0, 1.0)


def _penalised(logits: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
    """Repetition (Hugging Face, CTRL): positive logits of seen tokens divided, negative ones multiplied. Frequency and
    presence (OpenAI): subtracted per occurrence, and once, of generated tokens."""
    logits = logits.clone()
    for row, request in enumerate(requests):
        params = request.params
        if not _has_penalties(params):
            continue
        assert len(request.history) == request.position, "penalties need the whole sequence"
        history = np.asarray(request.history, dtype=np.int64)
        if params.repetition_penalty != 1.0:
            seen = torch.from_numpy(np.unique(history)).to(logits.device)
            values = logits[row, seen]
            penalty = params.repetition_penalty
            logits[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
        generated, counts = np.unique(history[request.num_prompt_tokens :], return_counts=True)
        if len(generated):
            malus = params.frequency_penalty * counts + params.presence_penalty
            ids = torch.from_numpy(generated).to(logits.device)
            logits[row, ids] -= torch.from_numpy(malus).to(logits)
    return logits


def _draw_random(logits: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
    """int64 [n]: one token per row of penalised logits."""
    params = [request.params for request in requests]
    temperatures = _column([p.temperature for p in params], logits)
    # Relative to the maximum no temperature, however low, overflows; the likeliest token's score is always 0.
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures
    if any(p.min_p > 0.0 or p.top_k > 0 or p.top_p < 1.0 for p in params):
        scores = scores.masked_fill(scores < _cutoff(scores, params), -torch.inf)
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    totals = cumulative[:, -1:]
    noise = _column([uniform(request.params.seed, request.position) for request in requests], totals)
    # Below the total even after rounding, so that the token found always has a probability.
    targets = torch.minimum(noise * totals, torch.nextafter(totals, torch.zeros_like(totals)))
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1)


def _cutoff(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[n, 1]: the lowest score that min_p, then top_k, then top_p leave in the running."""
    vocab = scores.shape[1]
    cutoff = _column([p.min_p for p in params], scores).log()
    if all(p.top_k == 0 and p.top_p >= 1.0 for p in params):
        return cutoff
    ranked = _descending(scores)
    if any(p.top_k > 0 for p in params):
        kth = torch.tensor([min(p.top_k or vocab, vocab) - 1 for p in params], device=scores.device)
        cutoff = torch.maximum(cutoff, ranked.gather(1, kth.unsqueeze(1)))
    if any(p.top_p < 1.0 for p in params):
        kept = ranked.masked_fill(ranked < cutoff, -torch.inf)
        mass = kept.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        top_p = _column([p.top_p if p.top_p < 1.0 else torch.inf for p in params], mass)
        # The token that reaches the mass is the last to stay.
        last = (mass < top_p).sum(dim=-1, keepdim=True).clamp(max=vocab - 1)
        cutoff = torch.maximum(cutoff, ranked.gather(1, last))
    return cutoff


# On CPUs numpy finds a maximum and sorts an order of magnitude faster than torch.


def _argmax(logits: Tensor) -> Tensor:
    """int64 [n]: the first of the largest."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(axis=1))
    return logits.argmax(dim=-1)


def _descending(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)
    return values.sort(dim=-1, descending=True).values


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
