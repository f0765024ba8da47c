"""A cost model reduced to six numbers: what router and workers correct while they run, and what a heartbeat carries.

A step of `rows` tokens (prompt tokens and decoding sequences together) takes

    step_s + sequence_s * decoding sequences + the cost of its rows
           + kv_token_s * KV tokens that decoding sequences read + pair_s * attention pairs

where a row costs `row_s` up to MANY_ROWS, and `many_row_s` beyond: a step of few rows is bound by reading weights, one
of many by arithmetic. The time is linear in the coefficients.
"""

from typing import Annotated, NamedTuple, Self

from pydantic import Field

from tandem.core.cost_model import CostModel, StepLoad, attention_pairs

MANY_ROWS = 256
_BATCH = 64  # the cost of a sequence is that between one and this many
_LONG_PROMPT = 2048  # the row cost of long steps is that between MANY_ROWS and this


Seconds = Annotated[float, Field(ge=0)]


class StepCoefficients(NamedTuple):
    """Seconds: of a step, of a decoding sequence, of a row in both ranges, of a token of KV read, of a pair of query
    and key."""

    step_s: Seconds
    sequence_s: Seconds
    row_s: Seconds
    many_row_s: Seconds
    kv_token_s: Seconds
    pair_s: Seconds

    @classmethod
    def of(cls, cost: CostModel) -> Self:
        """Coefficients from a cost model's times at the ends of the ranges."""
        one_s, kv_token_s = cost.decode_coefficients(1)
        batch_s, _ = cost.decode_coefficients(_BATCH)
        slope_s = max(0.0, batch_s - one_s) / (_BATCH - 1)
        step_s = max(0.0, one_s - slope_s)
        pair_s = max(0.0, _prompt_s(cost, MANY_ROWS, _LONG_PROMPT) - _prompt_s(cost, MANY_ROWS, 0))
        pair_s /= MANY_ROWS * _LONG_PROMPT
        many_s, long_s = (_prompt_s(cost, n, 0) - pair_s * attention_pairs(0, n) for n in (MANY_ROWS, _LONG_PROMPT))
        row_s = max(0.0, many_s - step_s) / MANY_ROWS
        return cls(
            step_s=step_s,
            sequence_s=max(0.0, slope_s - row_s),
            row_s=row_s,
            many_row_s=max(0.0, long_s - many_s) / (_LONG_PROMPT - MANY_ROWS),
            kv_token_s=kv_token_s,
            pair_s=pair_s,
        )

    def seconds(self, load: StepLoad) -> float:
        return sum(each_s * count for each_s, count in zip(self, step_terms(load), strict=True))


def step_terms(load: StepLoad) -> tuple[float, ...]:
    """How often each coefficient counts in a step of that load, in the order of the fields."""
    many = max(0, load.tokens - MANY_ROWS)
    return (1.0, load.decode_sequences, load.tokens - many, many, load.decode_kv_tokens, load.prefill_pairs)


def decode_step_s(costs: StepCoefficients, sequences: float, kv_tokens: float) -> float:
    """Seconds of a step that only decodes; `sequences` may be an expected number."""
    many = max(0.0, sequences - MANY_ROWS)
    rows_s = costs.sequence_s * sequences + costs.row_s * (sequences - many) + costs.many_row_s * many
    return costs.step_s + rows_s + costs.kv_token_s * kv_tokens


def _prompt_s(cost: CostModel, num_tokens: int, start: int) -> float:
    """Seconds of a prompt chunk with `start` tokens before it."""
    load = StepLoad(
        prefill_tokens=num_tokens,
        prefill_sequences=1,
        prefill_pairs=attention_pairs(start, num_tokens),
        prefill_kv_tokens=start + num_tokens,
        sampled=1,
    )
    return cost.step(load).total_s
