"""How many prompt tokens a step may take beside sequences that decode: as many as their slack allows. Pure.

The slack of a sequence is what it has saved against its TPOT target so far: the time until its next token is due,

    slack = (tokens after the first + 1) * tpot_s - (now - time of the first token)

TPOT is a mean over the whole answer, so saved time may be spent on another request's prompt: a step that is no longer
than the smallest slack makes nobody late. (Sarathi-Serve, OSDI '24, has the token budget for when nobody has saved
anything; TaiChi, arXiv 2508.01989, shifts latency from requests with slack to those at risk.)
"""

import math
from collections.abc import Sequence as Many
from dataclasses import replace

from tandem.core.cost_model import StepLoad, attention_pairs
from tandem.scheduling.predictor import StepPredictor
from tandem.scheduling.sequence import Sequence

LEAST_TOKENS = 16
"""Prompts advance by that much in any step: one that a stream of tight sequences held back would wait without end."""


def slack_s(sequence: Sequence, now_s: float) -> float:
    """Until the next token of a decoding sequence is due; below 0, it is late. inf: it has no target."""
    if sequence.first_token_s is None:
        return math.inf
    num_next = sequence.num_tokens - len(sequence.request.token_ids)  # 1 for the token after the first
    return num_next * sequence.request.slo.tpot_s - (now_s - sequence.first_token_s)


def max_prompt_tokens(
    decoding: Many[Sequence], start: int, max_tokens: int, now_s: float, predictor: StepPredictor
) -> int:
    """Of a step in which all of `decoding` take part, at most `max_tokens`; the first prompt token follows `start`
    others.

    A sequence whose target is missed even by steps without prompts has nothing to lose and sets no bound.
    """
    alone = StepLoad.of_decode(len(decoding), sum(sequence.num_tokens for sequence in decoding))
    alone_s = predictor.step_s(alone)
    longest_s = math.inf
    for sequence in decoding:
        slo = sequence.request.slo
        if alone_s < slo.tpot_s < math.inf:
            longest_s = min(longest_s, slack_s(sequence, now_s), slo.longest_gap_s)
    if longest_s == math.inf:
        return max_tokens

    def is_within(num_tokens: int) -> bool:
        pairs = attention_pairs(start, num_tokens)
        return predictor.step_s(replace(alone, prefill_tokens=num_tokens, prefill_pairs=pairs)) <= longest_s

    least, most = min(LEAST_TOKENS, max_tokens), max_tokens
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if is_within(middle) else (least, middle - 1)
    return least
