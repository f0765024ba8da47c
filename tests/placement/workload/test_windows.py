"""Windows cover a whole trace, and keep its rates relative to each other."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.placement.workload.requests import RequestStream
from tandem.placement.workload.windows import window_stream, windowed


def trace(*regimes: tuple[int, float, int, int], seed: int = 0) -> RequestStream:
    """Each regime: requests, requests per second, prompt tokens, output tokens."""
    rng = np.random.default_rng(seed)
    gaps_s = np.concatenate([rng.exponential(1 / rate, count) for count, rate, *_ in regimes])
    arrival_s = np.cumsum(gaps_s) - gaps_s[0]
    prompts = np.concatenate([np.full(count, prompt) for count, _, prompt, _ in regimes])
    outputs = np.concatenate([np.full(count, output) for count, *_, output in regimes])
    return RequestStream.make(arrival_s, prompts, outputs)


@settings(max_examples=60, deadline=None)
@given(
    regimes=st.lists(
        st.tuples(st.integers(1, 800), st.sampled_from([0.1, 1.0, 20.0]), st.integers(1, 999), st.integers(1, 99)),
        min_size=1,
        max_size=5,
    ),
    requests=st.sampled_from([10, 100, 500]),
    whole=st.booleans(),
)
def test_windows_stand_for_all_of_the_time(
    regimes: list[tuple[int, float, int, int]], requests: int, whole: bool
) -> None:
    asked = trace(*regimes)
    divided = windowed(asked, requests, whole=whole)
    windows, stream = divided.windows, divided.stream
    assert 1 <= len(windows) <= 8
    assert sum(window.time_share for window in windows) == pytest.approx(1)
    assert [window.rows[0] for window in windows] == [0, *(window.rows[1] for window in windows[:-1])]
    assert windows[-1].rows[1] == len(stream)
    assert divided.simulated_share == len(stream) / len(asked)
    assert all(one.end_s <= other.begin_s for one, other in pairwise(windows))
    if whole or len(asked) < 9 * requests:
        assert divided.simulated_share == 1
        np.testing.assert_allclose(stream.arrival_s, asked.arrival_s, atol=1e-6)
        assert windows[-1].end_s == pytest.approx(asked.duration_s)
        assert stream.load == 1


def test_windows_show_what_changes() -> None:
    divided = windowed(trace((2000, 5.0, 500, 100), (4000, 20.0, 2000, 50)), 1500)
    rates = [window.rate for window in divided.windows]
    assert min(rates) == pytest.approx(5, rel=0.1)
    assert max(rates) == pytest.approx(20, rel=0.1)
    assert divided.windows[0].prompt_tokens == 500
    assert divided.windows[-1].prompt_tokens == 2000
    assert divided.windows[-1].output_tokens == 50


def test_the_heaviest_window_of_a_long_trace_is_simulated() -> None:
    day, rush, rest = (20_000, 10.0, 100, 10), (1000, 30.0, 300, 10), (30_000, 10.0, 100, 10)
    divided = windowed(trace(day, rush, rest), 500)
    assert len(divided.windows) == 8
    assert divided.simulated_share < 0.2
    busiest = max(divided.windows, key=lambda window: window.prompt_tokens * window.rate)
    assert busiest.rate > 14
    assert busiest.prompt_tokens > 150
    alone = window_stream(divided.stream, busiest)
    assert alone.scaled_to(7.0).rate / 7.0 == pytest.approx(
        busiest.rate / (51_000 / trace(day, rush, rest).duration_s), rel=0.1
    )
    assert divided.stream.scaled_to(7.0).rate == pytest.approx(7.0 * divided.stream.load)


def test_a_window_keeps_its_rate_relative_to_the_trace() -> None:
    asked = trace((1000, 1.0, 10, 10), (1000, 3.0, 10, 10))
    divided = windowed(asked, 200)
    slow, *_, fast = (window_stream(divided.stream, window) for window in divided.windows)
    assert slow.scaled_to(30.0).rate == pytest.approx(20, rel=0.1)
    assert fast.scaled_to(30.0).rate == pytest.approx(60, rel=0.1)


def test_all_requests_at_once_are_one_window() -> None:
    divided = windowed(RequestStream.make(np.zeros(50), np.full(50, 7), np.full(50, 3)), 10)
    assert len(divided.windows) == 1
    assert divided.stream.load == 1
