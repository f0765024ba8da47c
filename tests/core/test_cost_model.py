"""Loads and costs of steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.cost_model import StepCost, StepLoad, attention_pairs, following_s


def test_pairs_count_the_causal_triangle() -> None:
    assert attention_pairs(0, 4) == 1 + 2 + 3 + 4
    assert attention_pairs(10, 2) == 11 + 12
    assert attention_pairs(7, 0) == 0


@given(start=st.integers(0, 50), first=st.integers(0, 50), second=st.integers(0, 50))
def test_chunks_of_a_prompt_have_the_pairs_of_the_whole(start: int, first: int, second: int) -> None:
    assert attention_pairs(start, first) + attention_pairs(start + first, second) == attention_pairs(
        start, first + second
    )


def test_loads_of_prompts_and_of_decode() -> None:
    load = StepLoad.of_prompts(3, 5)
    assert (load.tokens, load.prefill_sequences, load.prefill_pairs, load.sampled) == (8, 2, 6 + 15, 2)
    assert load.prefill_kv_tokens == 8
    # What published fits call the sum of squared lengths
    assert 2 * load.prefill_pairs - load.prefill_tokens == 3**2 + 5**2
    decode = StepLoad.of_decode(4, 100)
    assert (decode.tokens, decode.decode_kv_tokens, decode.sampled) == (4, 100, 4)
    assert StepLoad().tokens == 0


def test_terms_sum_to_the_total() -> None:
    cost = StepCost(linear_s=3e-3, kv_read_s=5e-3, overhead_s=1e-3, interval_s=4e-3)
    assert cost.total_s == pytest.approx(9e-3)
    assert "interval_s" not in cost.terms()


def test_steps_that_follow_each_other_wait_for_the_first_stage_and_for_the_last() -> None:
    long, short = StepCost(linear_s=0.8, interval_s=0.4), StepCost(linear_s=0.2, interval_s=0.1)
    assert following_s([]) == 0.0
    assert following_s([long]) == 0.8
    assert following_s([long, long]) == pytest.approx(1.2)
    assert following_s([long, short]) == pytest.approx(0.9), "it comes to the last stage behind the long one"
    assert following_s([short, long]) == pytest.approx(0.9)
