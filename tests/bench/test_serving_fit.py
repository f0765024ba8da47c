"""What is made of a measured cluster's answers."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import pytest
from pydantic import TypeAdapter

from bench.load_result import LoadRecord
from bench.pace import Pace, disturbed_s, pace_of
from bench.serving_answers import Answers, Loaded, Prompted, prompted_of, steps_of
from bench.serving_fit import Taken, decode_steps, path_costs, served_decode, served_prefill, serving_costs, wake
from tandem.core.cost_model import StepLoad
from tandem.placement.costs.calibration import CalibratedCost, Calibration, Terms
from tandem.placement.costs.serving import ServedStep, ServingCosts

TERMS = Terms(
    linear=((1, 0.010), (256, 0.300)),
    attention_per_pair=0.0,
    kv_read=((1, 1e-6),),
    kv_per_sequence=0.0,
    head=0.0,
    head_per_sampled=0.0,
)
ALONE = CalibratedCost(TERMS)  # the engine by itself
KV_TOKENS = 100  # of each sequence, on average, while it has its steps


def prompt_s(*lengths: int) -> float:
    return ALONE.step(StepLoad.of_prompts(*lengths)).total_s


def step_s(batch: int) -> float:
    base_s, per_token_s = ALONE.decode_coefficients(batch)
    return base_s + batch * KV_TOKENS * per_token_s


def prompted(
    num_tokens: int,
    prefill_s: float,
    transfer_s: float = 0.0,
    began_s: float = 0.0,
    decode_s: float = 0.0,
    num_output_tokens: int = 3,
) -> Prompted:
    before = {"admission_s": 0.001, "dispatch_s": 0.0005, "prefill_queue_s": 0.0025, "prefill_s": prefill_s}
    ttft_s = sum(before.values())
    after = {"transfer_s": transfer_s, "decode_queue_s": 0.0, "decode_s": decode_s}
    total_s = ttft_s + sum(after.values())
    return Prompted(
        num_tokens=num_tokens,
        num_output_tokens=num_output_tokens,
        began_s=began_s,
        first_s=ttft_s + 0.002,
        whole_s=total_s + 0.003,
        ttft_s=ttft_s,
        total_s=total_s,
        parts=before | after,
    )


def answer(num_steps: int, start_s: float, end_s: float) -> Prompted:
    """Whose steps of decode are from when to when, and whose prompt took 1 ms before."""
    # 1 ms less: what its last token takes to its client is longer than what its first one takes.
    decode_s, num_output_tokens = end_s - start_s - 0.001, num_steps + 1
    return prompted(
        KV_TOKENS - num_output_tokens // 2,
        prefill_s=0.001,
        began_s=start_s - 0.001,
        decode_s=decode_s,
        num_output_tokens=num_output_tokens,
    )


def decoded(num_steps: int, *spans: tuple[float, float]) -> tuple[Prompted, ...]:
    """So many steps each."""
    return tuple(answer(num_steps, *span) for span in spans)


def test_prompts_whose_steps_overlap_were_in_one() -> None:
    first, second = prompted(32, 0.100, began_s=1.0), prompted(64, 0.100, began_s=1.004)
    third, later = prompted(160, 0.200, began_s=1.102), prompted(8, 0.010, began_s=1.5)
    steps = steps_of([third, later, second, first])
    assert [step.lengths for step in steps] == [(32, 64), (160,), (8,)]
    assert [step.idle_s for step in steps] == pytest.approx([float("inf"), 0.002, 0.198])
    assert [step.taken_s for step in steps] == pytest.approx([0.1, 0.2, 0.01])


def test_what_is_too_much_for_one_step_is_computed_in_the_next() -> None:
    """The second prompt ends with the third, which is begun when the first has ended."""
    first, second = prompted(2000, 0.5, began_s=1.0), prompted(148, 0.7, began_s=1.001)
    third, fourth = prompted(300, 0.2, began_s=1.5), prompted(100, 0.1, began_s=1.9)
    steps = steps_of([first, second, third, fourth])
    assert [step.lengths for step in steps] == [(2000, 48), (100, 300), (100,)]
    assert [step.ended_s for step in steps][1:] == pytest.approx([1.7, 2.0])


def test_prompts_of_others_are_computed_too_and_keep_the_worker_busy() -> None:
    mine, with_it, alone = prompted(64, 0.1, began_s=2.0), prompted(4, 0.1, began_s=2.0), prompted(4, 0.3, began_s=1.6)
    (step,) = steps_of([mine], [with_it, alone])
    assert step.lengths == (64, 4)
    assert step.idle_s == pytest.approx(0.1)


def test_how_much_of_a_step_was_beside_decode() -> None:
    loaded = Loaded(decoded(1, (1.0, 2.0), (1.5, 3.0)), (prompted(8, 0.5, began_s=9.0, decode_s=0.499),))
    assert loaded.decode_share(1.0, 3.0) == pytest.approx(1.0)
    assert loaded.decode_share(0.0, 2.0) == pytest.approx(0.5)
    assert loaded.decode_share(3.5, 4.0) == 0
    assert loaded.decode_share(9.4, 10.1) == pytest.approx(5 / 7), "the prompts' own answers have steps of decode, too"


@pytest.mark.parametrize("shares", [(0.0, 1.0), (0.1, 0.8), (0.0, 0.2, 0.9)])
def test_serving_adds_a_constant_and_a_factor_more_beside_the_other(shares: Sequence[float]) -> None:
    alone, beside = ServedStep(constant_s=0.001, factor=1.02), ServedStep(constant_s=0.003, factor=1.2)
    steps = [
        Taken(engine_s, alone.toward(beside, share).seconds(engine_s), share)
        for engine_s in (0.02, 0.1, 0.4)
        for share in shares
    ]
    for one, expected in zip(served_prefill(steps), (alone, beside), strict=True):
        assert (one.constant_s, one.factor) == pytest.approx((expected.constant_s, expected.factor))


def test_steps_that_were_slowed_by_chance_count_as_much_as_others() -> None:
    taken_s = {0.1: (0.10, 0.14), 0.2: (0.22, 0.26)}
    _, beside = served_prefill([Taken(engine_s, one, 1.0) for engine_s, both in taken_s.items() for one in both])
    assert beside.seconds(0.1) == pytest.approx(0.12), "their mean"
    assert beside.seconds(0.2) == pytest.approx(0.24)


def test_steps_while_a_stranger_had_the_machine_are_left_out() -> None:
    usual = [Taken(0.1, 0.12, 1.0)] * 9 + [Taken(0.2, 0.24, 1.0)] * 9
    _, beside = served_prefill([*usual, Taken(0.1, 0.25, 1.0), Taken(0.2, 0.6, 1.0)])
    assert beside.seconds(0.1) == pytest.approx(0.12)
    assert beside.seconds(0.2) == pytest.approx(0.24)


def test_a_step_takes_longer_during_which_a_request_comes() -> None:
    steps = [
        Taken(engine_s, (1.1 + 0.1 * share) * engine_s + 0.004 * opened, share, opened, count=20)
        for engine_s in (0.006, 0.012)
        for opened in (0.02, 0.3)
        for share in (0.0, 0.7)
    ]
    alone, beside, open_s = served_decode(steps)
    assert open_s == pytest.approx(0.004)
    assert (alone.factor, beside.factor) == pytest.approx((1.1, 1.2))
    assert alone.constant_s == beside.constant_s == 0


def test_the_first_step_after_a_pause_takes_longer() -> None:
    alone, beside = ServedStep(factor=1.1), ServedStep(constant_s=0.003, factor=1.2)
    woken = [
        Taken(engine_s, usual_s * (1 + 0.08 * share), share, is_woken=True)
        for engine_s in (0.05, 0.2)
        for share in (1.0, 0.4, 0.0)
        if (usual_s := alone.toward(beside, share).seconds(engine_s))
    ]
    others = [Taken(0.1, 0.15, 1.0), Taken(0.1, 0.5, 1.0, is_woken=True)]  # not woken; with a stranger
    assert wake(alone, beside, woken + others) == pytest.approx(0.08)
    assert wake(alone, beside, [Taken(0.1, 0.05, 1.0, is_woken=True)]) == 0
    assert wake(alone, beside, others) == 0


def test_decode_is_compared_with_as_many_at_once_as_there_were() -> None:
    # Two answers of ten steps; for five of them they are together, and every step takes 1.5 times as long as predicted.
    alone_s, both_s = 5 * 1.5 * step_s(1), 5 * 1.5 * step_s(2)
    spans = (0.0, alone_s + both_s), (alone_s, alone_s + both_s + alone_s)
    first, second = decode_steps(ALONE, Loaded(decoded(10, *spans)))
    for step in (first, second):
        assert step.taken_s / step.engine_s == pytest.approx(1.5, rel=0.01), "a bit more: KV is read as fast"
        assert step.count == 10
    assert first.opened == pytest.approx(1 / 10), "the second one, and its KV"
    assert second.opened == 0
    assert first.beside == pytest.approx(0.001 / (alone_s + both_s)), "the second one's prompt"
    assert second.beside == 0


def test_answers_to_prompts_that_come_meanwhile_make_the_batch_larger() -> None:
    alone_s, both_s = 5 * step_s(1), 5 * step_s(2)
    began_s, decode_s = 0.75 * alone_s, both_s - 0.001
    other = prompted(KV_TOKENS - 1, 0.25 * alone_s, began_s=began_s, decode_s=decode_s, num_output_tokens=2)
    (step,) = decode_steps(ALONE, Loaded(decoded(10, (0.0, alone_s + both_s)), (other,)))
    assert step.taken_s == pytest.approx(step.engine_s, rel=1e-3)
    assert step.opened == pytest.approx(1 / 10)
    assert step.beside == pytest.approx(0.25 * alone_s / (alone_s + both_s))


def test_an_answer_whose_client_saw_all_of_it_at_once_counts_for_no_time() -> None:
    at_once = prompted(8, 0.1, transfer_s=0.02, began_s=0.1, decode_s=-0.02)
    assert at_once.decode_span == pytest.approx((0.22, 0.22))
    mine = decoded(30, (0.0, 30 * step_s(1)))
    (alone,), (beside,) = decode_steps(ALONE, Loaded(mine)), decode_steps(ALONE, Loaded(mine, (at_once,)))
    assert beside.engine_s == pytest.approx(alone.engine_s)


def test_answers_of_few_steps_tell_nothing() -> None:
    assert decode_steps(ALONE, Loaded(decoded(3, (0.0, 3 * step_s(1))))) == []


def test_reading_kv_takes_as_long_in_a_worker() -> None:
    read_s = KV_TOKENS * ALONE.decode_coefficients(1)[1]
    (step,) = decode_steps(ALONE, Loaded(decoded(10, (0.0, 10 * (1.3 * (step_s(1) - read_s) + read_s)))))
    assert step.taken_s / step.engine_s == pytest.approx(1.3, rel=0.01)
    assert step.engine_s == pytest.approx(step_s(1) - read_s)


def measured(prefill: ServedStep, decode: ServedStep) -> Answers:
    """Of a cluster whose workers take so long beside each other, and alone what the engine takes."""

    def loaded(began_s: float, *lengths: int) -> Loaded:
        taken_s = prefill.seconds(prompt_s(*lengths))
        prompts = tuple(prompted(n, taken_s, 0.01, began_s, decode_s=-0.011) for n in lengths)
        steps_beside = taken_s / decode.seconds(step_s(1))
        num_steps = max(10, math.ceil(steps_beside))
        ended_s = began_s + taken_s + (num_steps - steps_beside) * step_s(1)
        return Loaded(decoded(num_steps, (began_s, ended_s)), prompts)

    alone = [prompted(n, prompt_s(n), transfer_s=0.004 + n * 1e-5, began_s=10.0 * n) for n in (32, 64, 160)]
    steady = [loaded(10.0 * n, n) for n in (32, 64, 256)]
    return Answers(alone, [Loaded(decoded(100, (0.0, 100 * step_s(1))))], steady, [], [loaded(70.0, 32, 64)])


def calibration(serving: ServingCosts) -> Calibration:
    """The parts of one that count here."""
    return cast(Calibration, SimpleNamespace(terms=TERMS, serving=serving))


def test_what_was_measured_is_what_is_predicted() -> None:
    answers = measured(ServedStep(constant_s=0.003, factor=1.2), ServedStep(factor=1.3))
    costs = serving_costs(ALONE, answers)
    assert costs.prefill_beside.seconds(0.1) == pytest.approx(0.123)
    assert costs.prefill_alone.seconds(0.1) == pytest.approx(0.1)
    assert costs.decode_beside.seconds(step_s(1)) == pytest.approx(1.3 * step_s(1), rel=0.1), "in whole steps"
    for loaded in answers.steady:
        assert pace_of(loaded, calibration(costs)).prefill == pytest.approx(1.0)


def test_answers_are_kept_in_files_and_added_up() -> None:
    adapter = TypeAdapter(Answers)
    answers = measured(ServedStep(), ServedStep())
    again = adapter.validate_json(adapter.dump_json(answers))
    assert again == answers
    again.add(answers)
    assert again.steady == answers.steady * 2
    assert again.prompted_alone == answers.prompted_alone * 2


def test_a_transfer_has_a_latency_a_speed_and_a_turn() -> None:
    """Alone: 4 ms and 10 us a token, of which 1 ms is its turn. Beside decode, whose steps take 20 ms: 6 ms and a turn
    for each of the transfers of one step."""
    alone = [prompted(n, 0.1, transfer_s=0.004 + n * 1e-5) for n in (32, 32, 64, 160, 256)]
    beside = tuple(
        prompted(n, 0.1, transfer_s=0.006 + together * 0.001 + n * 1e-5 + 0.010, began_s=began_s)
        for began_s, together in ((1.0, 1), (2.0, 3), (3.0, 2))
        for n in (32, 64, 160)[:together]
    )
    answers = Answers(prompted_alone=alone, crowded=[Loaded(decoded(10, (0.0, 0.2)), beside)])
    request_path = path_costs(answers, kv_bytes_per_token=12288.0)
    assert request_path.transfer_alone_s == pytest.approx(0.003)
    assert request_path.transfer_beside_s == pytest.approx(0.006)
    assert request_path.transfer_turn_s == pytest.approx(0.001)
    assert request_path.transfer_bytes_per_s == pytest.approx(12288.0 / 1e-5)
    assert request_path.admission_s == pytest.approx(0.004), "until the step began, less what waits for the answer"
    assert request_path.first_token_s == pytest.approx(0.002)
    assert request_path.token_s == pytest.approx(0.003)


def test_transfers_that_do_not_grow_with_the_prompt_are_endlessly_fast_but_finite() -> None:
    alone = [prompted(n, 0.1, transfer_s=0.01 - n * 1e-6) for n in (32, 64, 160, 256)]
    crowded = [Loaded(decoded(10, (0.0, 0.2)), (prompted(32, 0.1, transfer_s=0.02),))]
    request_path = path_costs(Answers(prompted_alone=alone, crowded=crowded), kv_bytes_per_token=12288.0)
    assert 0 < request_path.transfer_bytes_per_s < float("inf")


def test_what_was_measured_too_shortly_is_not_fitted() -> None:
    none = Loaded(decoded(10, (0.0, 0.2)))
    some = Loaded(none.decoded, (prompted(32, 0.1),))
    assert Answers(steady=[some], crowded=[none, some]).is_enough
    assert not Answers(steady=[some], crowded=[none]).is_enough
    assert not Answers(steady=[none], crowded=[some]).is_enough


@pytest.mark.parametrize(("prefill", "decode", "usual"), [(1.05, 0.95, True), (1.07, 1.0, False), (1.0, 0.93, False)])
def test_a_machines_pace_is_compared_with_its_calibration(prefill: float, decode: float, usual: bool) -> None:
    assert Pace(prefill, decode).is_usual(0.06) is usual


@pytest.mark.parametrize(("slow_s", "times", "disturbed"), [(0.0, 1.0, 0.0), (6.0, 2.0, 6.0), (6.0, 1.15, 0.0)])
def test_a_stranger_is_seen_in_a_runs_own_steps(slow_s: float, times: float, disturbed: float) -> None:
    """A second between the prompts; from the tenth on those of `slow_s` take longer than they should."""
    usual_s = prompt_s(200)
    prompts = [
        prompted(200, usual_s * (times if 10.0 <= at_s < 10.0 + slow_s else 1.0), began_s=at_s)
        for at_s in map(float, range(30))
    ]
    assert disturbed_s(prompts, calibration(ServingCosts())) == disturbed


def test_an_answer_of_a_load_run_is_an_answer_too() -> None:
    parts = {"prefill_s": 0.2, "transfer_s": 0.01, "decode_queue_s": 0.0, "decode_s": 0.5}
    timeline: dict[str, object] = {"parts": parts, "ttft_s": 0.24, "total_s": 0.75}
    record = LoadRecord(3, 9.9, 64, 16, 0, sent_s=10.0, first_s=10.25, last_s=10.77, timeline=timeline)
    one = prompted_of(record)
    assert one is not None
    assert (one.num_tokens, one.first_s, one.whole_s) == pytest.approx((64, 0.25, 0.77))
    assert (one.began_s, one.ended_s) == pytest.approx((10.05, 10.25))
    assert one.decode_span == pytest.approx((10.26, 10.77))
    assert prompted_of(LoadRecord(4, 9.9, 64, 16, 0, sent_s=10.0, error="gone")) is None
