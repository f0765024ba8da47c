from dataclasses import replace

import pytest

from tandem.core.cost_model import StepCost, StepLoad
from tandem.scheduling.mixed_routing import Offer, Pace, Targets, choose_offer, colocated_offer, pair_offer
from tandem.scheduling.routing import DecodeView

_VIEW = DecodeView("c", "", ready=True, max_model_len=999, block_size=10, total_blocks=100, free_blocks=100, running=0)


class _Cost:
    """10 ms per step, 1 ms per token, 0.01 ms per token of KV that decoding reads."""

    def step(self, load: StepLoad) -> StepCost:
        return StepCost(linear_s=1e-3 * load.tokens, kv_read_s=1e-5 * load.decode_kv_tokens, overhead_s=0.01)

    def decode_coefficients(self, sequences: int) -> tuple[float, float]:
        return 0.01 + 1e-3 * sequences, 1e-5


_PACE = Pace(_Cost(), max_batch_tokens=90, max_batch=4)


def _colocated(view: DecodeView, pace: Pace = _PACE, queued: int = 0, per_step: float = 0.0) -> Offer:
    return colocated_offer(
        view, pace, queued_tokens=queued, prompt_tokens_per_step=per_step, num_tokens=90, growth_tokens=30
    )


def test_a_pair_promises_the_time_of_its_queue_and_of_its_next_decode_step() -> None:
    busy = replace(_VIEW, instance_id="d", running=2, free_blocks=70)
    offer = pair_offer("p", 180.0, _PACE, busy, _PACE, num_tokens=90, growth_tokens=30)
    assert offer.instance_id == "p"
    assert offer.ttft_s == pytest.approx(0.2)  # two steps of 90 tokens, 100 ms each
    assert offer.tpot_s == pytest.approx(0.01 + 0.003 + 1e-5 * (300 + 120))
    assert offer.has_room


def test_a_colocated_instance_is_slower_by_what_its_two_phases_take_from_each_other() -> None:
    idle = _colocated(_VIEW)
    assert idle.ttft_s == pytest.approx(0.1)
    assert idle.tpot_s == pytest.approx(0.01 + 0.001 + 1e-5 * 120 + 3 / 900)  # it is 90 prompt tokens in 30 steps
    busy = replace(_VIEW, running=2, free_blocks=70)
    loaded = _colocated(busy, queued=86, per_step=9.0)
    assert loaded.ttft_s == pytest.approx((86 + 90) / 88 * (0.1 + 1e-5 * 300))
    assert loaded.tpot_s == pytest.approx(0.01 + 0.003 + 1e-5 * 420 + 12 / 900)
    whole = _colocated(busy, replace(_PACE, mixing="prompt_first"), queued=86, per_step=9.0)
    assert whole.ttft_s == pytest.approx(176 / 900), "prompts stop the decoding, so it takes nothing from them"


@pytest.mark.parametrize("full", [replace(_VIEW, running=4), replace(_VIEW, running=1, free_blocks=11)])
def test_nobody_is_sent_where_the_batch_or_the_memory_is_full(full: DecodeView) -> None:
    assert _colocated(replace(full, running=3 if full.running == 4 else 1, free_blocks=12)).has_room
    offer = _colocated(full)
    assert not offer.has_room
    slow = Offer("p", ttft_s=50.0, tpot_s=1.0, has_room=True)
    choice = choose_offer([offer, slow], Targets(), {})
    assert choice.instance_id == "p"
    assert "full" in choice.explain()
    assert choose_offer([offer, replace(slow, has_room=False)], Targets(), {}).instance_id == "c"


def test_the_least_pressure_on_the_worse_of_the_two_targets_wins() -> None:
    pair, both = Offer("p", 0.8, 0.01, has_room=True), Offer("c", 0.1, 0.04, has_room=True)
    assert choose_offer([pair, both], Targets(1.0, 0.1), {}).instance_id == "c"
    assert choose_offer([pair, both], Targets(2.0, 0.05), {}).instance_id == "p"
    choice = choose_offer([pair, both], Targets(1.0, 0.1), {})
    assert [candidate.score for candidate in choice.candidates] == [pytest.approx(0.4), pytest.approx(0.8)]
    assert all(
        candidate.score == pytest.approx(sum(value for _, value in candidate.terms)) for candidate in choice.candidates
    )


def test_equal_offers_take_turns() -> None:
    offers = [Offer("a", 0.1, 0.01, has_room=True), Offer("b", 0.1, 0.01, has_room=True)]
    assert choose_offer(offers, Targets(), {"a": 2, "b": 1}).instance_id == "b"
    assert choose_offer(offers, Targets(), {"b": 1}).instance_id == "a"
