"""From logits to tokens.

The order is vLLM's: penalties, temperature, min_p, top_k, top_p. Reported log-probabilities are those of the model
itself, log_softmax of the raw logits before all of these, as OpenAI and vLLM report them.

A row's token depends only on its logits, its parameters and its (seed, position). Candidates are all tokens above a
lowest score, so that equal tokens are kept or removed together, and the token is sampled by inverting the cumulative
distribution in the order of token ids: nothing depends on how a sort breaks ties. Greedy takes the lowest id among
equal logits.

Two modules implement this. On CPUs `sample_row` computes rows one by one, each in cache, so that even rounding does not
depend on the batch; on other devices `sample_batch` computes all rows at once in plain torch.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tandem.core.errors import InternalError
from tandem.core.request import SampledToken, SamplingParams, TokenLogprob
from tandem.engine import sample_batch, sample_row
from tandem.engine.batching import num_wanted_rows
from tandem.engine.noise import uniform
from tandem.engine.step import SampleRequest, SequenceSlice, StepOutput

# Prompt log-probabilities need logits of every token, [tokens, vocab]; this many rows are computed at a time.
_ROWS_AT_ONCE = 128


def sample_slices(slices: Sequence[SequenceSlice], hidden: Tensor, to_logits: Callable[[Tensor], Tensor]) -> StepOutput:
    """Log-probabilities and tokens of a step from `hidden` [rows, hidden], which `Engine.forward(slices)` returned.

    `to_logits` is [n, hidden] -> float32 [n, vocab]; it gets what `inputs_of_logits` yields. The results are on the
    host.
    """
    assert sum(map(num_wanted_rows, slices)) == len(hidden), "hidden states of another step"
    wanted = map(to_logits, inputs_of_logits(slices, hidden))
    output = StepOutput([None] * len(slices), [None] * len(slices), [None] * len(slices))
    drawn: list[tuple[int, SampleRequest]] = []  # slice, request
    for index, part in enumerate(slices):
        if part.prompt_logprobs is not None:
            entries = _prompt_logprobs(part, part.prompt_logprobs, wanted)
            if any(math.isnan(entry.logprob) for entry in entries):
                output.errors[index] = _not_a_number()
            else:
                output.prompt_logprobs[index] = entries
        if part.sample is not None:
            drawn.append((index, part.sample))
    if drawn:
        results = sample(next(wanted), [request for _, request in drawn])
        for (index, _), result in zip(drawn, results, strict=True):
            if isinstance(result, InternalError):
                output.errors[index] = result
            elif output.errors[index] is None:
                output.tokens[index] = result
    return output


def inputs_of_logits(slices: Sequence[SequenceSlice], hidden: Tensor) -> Iterator[Tensor]:
    """The hidden states [n, hidden] of which a step needs logits, in the order in which `sample_slices` needs them:
    those before the known tokens of each scored slice, some at a time, then all from which a token is drawn.
    """
    drawn: list[int] = []
    end = 0
    for part in slices:
        begin, end = end, end + num_wanted_rows(part)
        if part.prompt_logprobs is not None:
            known = len(part.token_ids) - (part.next_token_id is None)
            for first in range(begin, begin + known, _ROWS_AT_ONCE):
                yield hidden[first : min(first + _ROWS_AT_ONCE, begin + known)]
        if part.sample is not None:
            drawn.append(end - 1)
    if drawn:
        yield hidden if len(drawn) == len(hidden) else hidden[drawn]


def sample(logits: Tensor, requests: Sequence[SampleRequest]) -> list[SampledToken | InternalError]:
    """Draw one token per row of float32 `logits` [n, vocab]. A row whose logits are not finite gets an error."""
    token_ids = _draw(logits, requests)
    results: list[SampledToken | InternalError] = [
        _not_a_number() if token_id is None else SampledToken(token_id) for token_id in token_ids
    ]
    reported = [
        (row, token_id, request.params.logprobs)
        for row, (token_id, request) in enumerate(zip(token_ids, requests, strict=True))
        if token_id is not None and request.params.logprobs is not None
    ]
    if reported:
        rows, chosen, counts = zip(*reported, strict=True)
        wanted = logits if len(rows) == len(requests) else logits[list(rows)]
        for row, token_id, entry in zip(rows, chosen, logprobs(wanted, chosen, counts), strict=True):
            results[row] = SampledToken(token_id, entry)
    return results


def _not_a_number() -> InternalError:
    return InternalError("The model's output for this request is not a number")


def logprobs(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """The log-probabilities of one token per row of raw `logits` [n, vocab] and of the row's `counts` likeliest.

    NaN for a row whose logits are not finite.
    """
    if logits.device.type != "cpu":
        return sample_batch.logprobs(logits, token_ids, counts)
    scratch = sample_row.allocate_scratch(logits.shape[1])
    rows = zip(logits.float().unbind(), token_ids, counts, strict=True)
    return [sample_row.logprobs(row, token_id, count, scratch) for row, token_id, count in rows]


def _prompt_logprobs(part: SequenceSlice, count: int, wanted: Iterator[Tensor]) -> list[TokenLogprob]:
    """Log-probabilities of the tokens after the slice's first; `wanted` yields the logits of the slice's rows next."""
    following = list(part.token_ids[1:])
    if part.next_token_id is not None:
        following.append(part.next_token_id)
    entries: list[TokenLogprob] = []
    for begin in range(0, len(following), _ROWS_AT_ONCE):
        token_ids = following[begin : begin + _ROWS_AT_ONCE]
        entries += logprobs(next(wanted), token_ids, [count] * len(token_ids))
    return entries


def _draw(logits: Tensor, requests: Sequence[SampleRequest]) -> list[int | None]:
    """Token ids; None for a row whose logits are not finite."""
    params = [request.params for request in requests]
    noise = [uniform(request.params.seed, request.position) for request in requests]
    if logits.device.type == "cpu":
        scratch = sample_row.allocate_scratch(logits.shape[1])
        rows = zip(logits.unbind(), requests, noise, strict=True)
        return [sample_row.draw(_penalised(row, request), request.params, u, scratch) for row, request, u in rows]
    if any(_has_penalties(p) for p in params):
        rows_of_all = zip(logits.unbind(), requests, strict=True)
        logits = torch.stack([_penalised(row, request) for row, request in rows_of_all])
    return sample_batch.draw(logits, params, noise)


def _has_penalties(params: SamplingParams) -> bool:
    return (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) != (0.0, 0.0, 1.0)


def _penalised(logits: Tensor, request: SampleRequest) -> Tensor:
    """One row [vocab], copied if the request has penalties. Repetition (Hugging Face, CTRL) divides positive logits of
    seen tokens and multiplies negative ones. Frequency and presence (OpenAI) subtract from logits of generated tokens
    per occurrence and once."""
    params = request.params
    if not _has_penalties(params):
        return logits
    assert len(request.history) == request.position, "penalties need the whole sequence"
    logits = logits.clone()
    history = np.asarray(request.history, dtype=np.int64)
    if params.repetition_penalty != 1.0:
        # A token that occurs twice is written twice, with the same value.
        seen = torch.from_numpy(history).to(logits.device)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.presence_penalty, params.frequency_penalty) != (0.0, 0.0):
        generated, counts = np.unique(history[request.num_prompt_tokens :], return_counts=True)
        penalties = params.frequency_penalty * counts + params.presence_penalty
        logits[torch.from_numpy(generated).to(logits.device)] -= torch.from_numpy(penalties).to(logits)
    return logits
