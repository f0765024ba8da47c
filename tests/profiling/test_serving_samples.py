"""Which steps and shares of time the samples of a cluster stand for."""

import pytest
from pydantic import TypeAdapter

from tandem.placement.costs.serving import ServedStep
from tandem.profiling.serving_samples import LoadPeriod, ServingSamples, prefill_steps_of
from tests.profiling.samples import cluster_samples, decoding, prompted


def test_prompts_whose_prefill_times_overlap_were_in_one_step() -> None:
    first, second = prompted(32, 0.100, began_s=1.0), prompted(64, 0.100, began_s=1.004)
    third, later = prompted(160, 0.200, began_s=1.102), prompted(8, 0.010, began_s=1.5)
    steps = prefill_steps_of([third, later, second, first])
    assert [step.lengths for step in steps] == [(32, 64), (160,), (8,)]
    assert [step.idle_s for step in steps] == pytest.approx([float("inf"), 0.002, 0.198])
    assert [step.duration_s for step in steps] == pytest.approx([0.1, 0.2, 0.01])


def test_tokens_beyond_the_budget_of_a_step_are_computed_in_the_next() -> None:
    """The second prompt ends with the third, which begins when the first has ended."""
    first, second = prompted(2000, 0.5, began_s=1.0), prompted(148, 0.7, began_s=1.001)
    third, fourth = prompted(300, 0.2, began_s=1.5), prompted(100, 0.1, began_s=1.9)
    steps = prefill_steps_of([first, second, third, fourth])
    assert [step.lengths for step in steps] == [(2000, 48), (100, 300), (100,)]
    assert [step.ended_s for step in steps][1:] == pytest.approx([1.7, 2.0])


def test_prompts_of_others_are_computed_too_and_keep_the_worker_busy() -> None:
    mine, with_it, alone = prompted(64, 0.1, began_s=2.0), prompted(4, 0.1, began_s=2.0), prompted(4, 0.3, began_s=1.6)
    (step,) = prefill_steps_of([mine], [with_it, alone])
    assert step.lengths == (64, 4)
    assert step.idle_s == pytest.approx(0.1)


def test_the_share_of_a_step_during_which_decode_computed() -> None:
    prompt = prompted(8, 0.5, began_s=9.0, decode_s=0.499)
    period = LoadPeriod(decoding(1, (1.0, 2.0), (1.5, 3.0)), (prompt,))
    assert period.decode_share(1.0, 3.0) == pytest.approx(1.0)
    assert period.decode_share(0.0, 2.0) == pytest.approx(0.5)
    assert period.decode_share(3.5, 4.0) == 0
    assert period.decode_share(9.4, 10.1) == pytest.approx(5 / 7), "prompted requests have decode steps, too"


def test_samples_are_kept_in_files_and_added_up() -> None:
    adapter = TypeAdapter(ServingSamples)
    samples = cluster_samples(ServedStep(), ServedStep())
    again = adapter.validate_json(adapter.dump_json(samples))
    assert again == samples
    again.add(samples)
    assert again.steady == samples.steady * 2
    assert again.prefill_alone == samples.prefill_alone * 2


def test_too_few_samples_are_not_fitted() -> None:
    without = LoadPeriod(decoding(10, (0.0, 0.2)))
    with_prompt = LoadPeriod(without.decoding, (prompted(32, 0.1),))
    assert ServingSamples(steady=[with_prompt], concurrent=[without, with_prompt]).can_be_fitted
    assert not ServingSamples(steady=[with_prompt], concurrent=[without]).can_be_fitted
    assert not ServingSamples(steady=[without], concurrent=[with_prompt]).can_be_fitted
