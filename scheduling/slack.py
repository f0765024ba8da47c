"""How many prompt tokens a step may have beside decoding sequences: as many as the slack of these allows. Pure.

The slack of a sequence is the time until its next token is due by its TPOT target:

    slack = (tokens after the first + 1) * tpot_s - (now - time of the first token)

TPOT is a mean over the answer, so time that was saved may be spent on another request's prompt: a step that is no
longer than the smallest slack makes no sequence late. (Sarathi-Serve, OSDI '24, has the token budget without saved
time; TaiChi, arXiv 2508.01989, shifts latency from requests with slack to requests at risk.)
"""

import math
from collections.abc import Sequence as Many
from dataclasses import replace

from tandem.core.cost_model import StepLoad, attention_pairs
from tandem.scheduling.predictor import StepPredictor
from tandem.scheduling.sequence import Sequence

MIN_TOKENS = 16
"""Prompt tokens in every step, whatever the slack: without them, sequences without slack could hold back prompts for
ever."""


def slack_s(sequence: Sequence, now_s: float) -> float:
    """Seconds until the next token of a decoding sequence is due; negative: the token is late. inf: no target."""
    if sequence.first_token_s is None:
        return math.inf
    num_next = sequence.num_tokens - len(sequence.request.token_ids)  # 1 for the token after the first
    return num_next * sequence.request.slo.tpot_s - (now_s - sequence.first_token_s)


def max_prompt_tokens(
    decoding: Many[Sequence], start: int, max_tokens: int, now_s: float, predictor: StepPredictor
) -> int:
    """Prompt tokens for a step with all `decoding` sequences, at most `max_tokens`. The first of them has `start`
    tokens of its prompt before it.

    A sequence whose target even steps without prompts would miss sets no bound.
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

    least, most = min(MIN_TOKENS, max_tokens), max_tokens
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if is_within(middle) else (least, middle - 1)
    return least
