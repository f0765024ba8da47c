"""Prompts beside decoding take the time that was saved, and no more."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.cost_model import StepLoad, attention_pairs
from tandem.core.request import GenerationRequest, SamplingParams
from tandem.core.request_slo import RequestSlo
from tandem.core.step_coefficients import StepCoefficients
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.budget import Mixing, StepBudget
from tandem.scheduling.predictor import StepPredictor
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.scheduler import Scheduler
from tandem.scheduling.sequence import Sequence
from tandem.scheduling.slack import MIN_TOKENS, max_prompt_tokens, slack_s
from tandem.scheduling.step_load import step_load

COSTS = StepCoefficients(0.01, 1e-5, 1e-4, 1e-4, 1e-7, 1e-9)


def decoding_sequence(
    name: str, tpot_s: float, num_tokens: int, first_token_s: float, max_gap_s: float | None = None
) -> Sequence:
    """`num_tokens` after the first."""
    slo = RequestSlo("x", tpot_s=tpot_s, max_gap_s=max_gap_s)
    request = GenerationRequest(name, (1,) * 8, SamplingParams(max_tokens=500), slo=slo)
    sequence = Sequence(name, request, arrival_s=0.0)
    sequence.token_ids += [0] * (num_tokens + 1)
    sequence.first_token_s = first_token_s
    return sequence


def test_slack_is_the_time_until_the_next_token_is_due() -> None:
    sequence = decoding_sequence("a", 0.05, 9, first_token_s=1.0)
    assert slack_s(sequence, 1.5) == pytest.approx(0.0)  # the tenth token after the first is due now
    assert slack_s(sequence, 1.2) == pytest.approx(0.3)
    assert slack_s(decoding_sequence("b", float("inf"), 9, 1.0), 9.0) == float("inf")


@given(
    st.lists(
        st.tuples(
            st.floats(0.005, 0.2),
            st.integers(0, 100),
            st.floats(0.0, 5.0),
            st.one_of(st.none(), st.floats(0.001, 0.3)),
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 4000),
    st.integers(1, 4096),
)
def test_a_step_is_no_longer_than_the_slack_of_sequences_that_can_meet_their_target(
    drawn: list[tuple[float, int, float, float | None]], start: int, max_tokens: int
) -> None:
    decoding = [decoding_sequence(str(i), *each) for i, each in enumerate(drawn)]
    predictor, now_s = StepPredictor(COSTS), 5.0
    count = max_prompt_tokens(decoding, start, max_tokens, now_s, predictor)
    assert min(MIN_TOKENS, max_tokens) <= count <= max_tokens
    kv_tokens = sum(sequence.num_tokens for sequence in decoding)

    def step_s(num_tokens: int) -> float:
        pairs = attention_pairs(start, num_tokens)
        return predictor.step_s(
            StepLoad(num_tokens, 0, pairs, decode_sequences=len(decoding), decode_kv_tokens=kv_tokens)
        )

    tight = [each for each in decoding if each.request.slo.tpot_s > step_s(0)]
    allowed_s = min((min(slack_s(each, now_s), each.request.slo.longest_gap_s) for each in tight), default=1e9)
    assert count <= MIN_TOKENS or step_s(count) <= allowed_s
    assert count == max_tokens or step_s(count + 1) > allowed_s


@settings(deadline=None, max_examples=30)
@given(prompt=st.integers(1, 1500), tpot_s=st.sampled_from([0.012, 0.02, 0.04]), wait_s=st.floats(0.0, 1.0))
def test_a_prompt_beside_a_decoding_sequence_makes_no_token_late(prompt: int, tpot_s: float, wait_s: float) -> None:
    """Unless steps of the least chunk are too long already. With `chunked` the same prompt makes tokens late."""

    def latest_s(mixing: Mixing) -> float:
        index = PrefixIndex(pool := BlockPool(200), 16)
        budget = StepBudget(8, 2048, 2048, 8, mixing)
        scheduler = Scheduler(budget, pool, index, 4096, StepPredictor(COSTS))
        slo, now_s, latest_s = RequestSlo("x", tpot_s=tpot_s), 0.0, 0.0
        request = GenerationRequest("a", (1,) * 4, SamplingParams(max_tokens=300), slo=slo)
        scheduler.add(Sequence("a", request, arrival_s=0.0))
        is_in = False
        while chunks := scheduler.next_batch(now_s):
            now_s += COSTS.seconds(step_load(chunks))
            for chunk in chunks:
                scheduler.computed(chunk)
                if not chunk.samples:
                    continue
                sequence = scheduler.generated(chunk.sequence.key, 0)
                if sequence.first_token_s is None:
                    sequence.first_token_s = now_s
                elif sequence.key == "a":
                    due_s = sequence.first_token_s + (sequence.num_generated - 1) * tpot_s
                    latest_s = max(latest_s, now_s - due_s)
                if sequence.num_generated == 300 or sequence.key == "b":
                    scheduler.finish(sequence.key)
            if now_s >= wait_s and not is_in:
                is_in = True
                scheduler.add(Sequence("b", GenerationRequest("b", (2,) * prompt, SamplingParams()), arrival_s=now_s))
        assert is_in
        assert len(scheduler) == 0, "the prompt advances in spite of the target"
        return latest_s

    least_s = COSTS.seconds(StepLoad(MIN_TOKENS, decode_sequences=1, decode_kv_tokens=4096))
    if least_s <= tpot_s:
        assert latest_s("slack") <= 1e-9
    assert latest_s("slack") <= latest_s("chunked") + 1e-9
