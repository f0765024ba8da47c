"""Times of sums and messages by size, and their part of a step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.placement.costs.rank_messages import (
    MessageCost,
    MessageCosts,
    MessageTime,
    StepMessages,
    fit_message_cost,
    message_error,
)

SIZES = [1 << exponent for exponent in range(10, 25, 2)]


def times_of(cost: MessageCost, sizes: list[int]) -> list[MessageTime]:
    return [MessageTime(num_bytes=size, seconds=cost.seconds(size)) for size in sizes]


@given(latency_s=st.floats(1e-7, 1e-2), bytes_per_s=st.floats(1e7, 1e12))
def test_the_fit_finds_the_model_that_made_the_times(latency_s: float, bytes_per_s: float) -> None:
    times = times_of(MessageCost(latency_s=latency_s, bytes_per_s=bytes_per_s), SIZES)
    fitted = fit_message_cost(times)
    assert message_error(fitted, times) < 1e-6
    assert fitted.seconds(1 << 19) == pytest.approx(latency_s + (1 << 19) / bytes_per_s, rel=1e-6)


@pytest.mark.parametrize(
    ("small_s", "large_s", "latency_s", "gigabytes_per_s"),
    [
        # All-reduces of 64 KB and 32 MB between two Xeon sockets, DeepSpeed pull request 5391; by hand, the slope is
        # (32 MB - 64 KB) / (large - small), and the rest of the small one is the latency.
        pytest.param(0.23e-3, 30.7e-3, 169e-6, 1.081, id="gloo"),
        pytest.param(0.028e-3, 0.65e-3, 26.8e-6, 52.94, id="shared memory"),
    ],
)
def test_published_all_reduces(small_s: float, large_s: float, latency_s: float, gigabytes_per_s: float) -> None:
    sizes = (64 << 10, 32 << 20)
    times = [MessageTime(num_bytes=n, seconds=s) for n, s in zip(sizes, (small_s, large_s), strict=True)]
    cost = fit_message_cost(times)
    assert message_error(cost, times) < 1e-9
    assert cost.latency_s == pytest.approx(latency_s, rel=0.02)
    assert cost.bytes_per_s == pytest.approx(1e9 * gigabytes_per_s, rel=0.02)


def test_times_without_a_slope_have_no_infinite_rate() -> None:
    cost = fit_message_cost([MessageTime(num_bytes=size, seconds=1e-5) for size in SIZES])
    assert cost.latency_s == pytest.approx(1e-5)
    assert cost.seconds(1 << 30) < 2e-4


def test_a_step_has_two_sums_in_a_layer_one_of_the_embedding_and_a_message_to_each_later_stage() -> None:
    messages = StepMessages(all_reduces=25, all_reduce_bytes=4 * 512, sends=2, send_bytes=2 * 512)
    sum_cost, send_cost = MessageCost(latency_s=1e-5, bytes_per_s=1e9), MessageCost(latency_s=2e-5, bytes_per_s=2e9)
    sums_s, sends_s = MessageCosts(messages, sum_cost, send_cost).seconds(rows=100)
    assert sums_s == pytest.approx(25 * (1e-5 + 100 * 2048 / 1e9))
    assert sends_s == pytest.approx(2 * (2e-5 + 100 * 1024 / 2e9))
    assert MessageCosts(StepMessages(), None, None).seconds(rows=100) == (0.0, 0.0)
