"""Properties of drawing a token, and its definitions against those of transformers."""

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tandem.core.errors import InternalError
from tandem.core.request import SampledToken, SamplingParams
from tandem.engine import sample_batch, sample_row
from tandem.engine.sampler import logprobs, sample
from tandem.engine.step import SampleRequest

_VOCAB = 40

_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-30, 0.1, 0.7, 1.0, 3.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 20, 1000]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    seed=st.integers(0, 1 << 64),
    logprobs=st.sampled_from([None, 0, 3]),
)
_rows = st.lists(st.floats(-20, 20, width=32), min_size=_VOCAB, max_size=_VOCAB)
_histories = st.lists(st.integers(0, _VOCAB - 1), min_size=1, max_size=12)


def _request(params: SamplingParams, history: list[int] | None = None, num_prompt_tokens: int = 1) -> SampleRequest:
    history = [0] if history is None else history
    return SampleRequest(params, len(history), history, num_prompt_tokens)


def _token(result: SampledToken | InternalError) -> int:
    assert isinstance(result, SampledToken)
    return result.token_id


def _support(logits: Tensor, params: SamplingParams, draws: int = 300) -> set[int]:
    requests = [_request(replace(params, seed=seed)) for seed in range(draws)]
    return {_token(result) for result in sample(logits.expand(draws, -1), requests)}


def _logits(num_rows: int, vocab: int, scale: float, seed: int) -> Tensor:
    """Rounded, so that some are equal."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, vocab, generator=generator) * scale * 64).round() / 64


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(_params, _histories), min_size=2, max_size=32),
    st.sampled_from([41, 511, 512, 513, 1537, 5003]),
    st.sampled_from([0.1, 1.0, 6.0]),
    st.integers(0, 1000),
)
def test_a_row_of_many_tokens_does_not_depend_on_its_batch(
    cases: list[tuple[SamplingParams, list[int]]], vocab: int, scale: float, seed: int
) -> None:
    logits = _logits(len(cases), vocab, scale, seed)
    requests = [_request(params, history) for params, history in cases]
    together = sample(logits, requests)
    assert together == [sample(logits[row : row + 1].clone(), [request])[0] for row, request in enumerate(requests)]
    # Neither on where the rows lie in memory.
    apart = torch.empty(vocab * len(cases) * 2 + 3)[3:].view(-1, 2, vocab)[:, 1]
    assert together == sample(apart.copy_(logits), requests)
    backwards = sample(logits.flip(0), requests[::-1])
    assert together == backwards[::-1]


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 30}, {"min_p": 0.01}])
def test_a_row_does_not_depend_on_the_number_of_threads(params: dict[str, Any]) -> None:
    """Of a vocabulary large enough for torch to share it out."""
    logits = _logits(2, 100_003, 1.0, 8)
    requests = [_request(SamplingParams(**params, seed=seed, logprobs=2)) for seed in (1, 2)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = sample(logits, requests)
        torch.set_num_threads(2)
        assert sample(logits, requests) == alone
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(_rows, _params, _histories), min_size=2, max_size=5))
def test_a_row_does_not_depend_on_its_batch(cases: list[tuple[list[float], SamplingParams, list[int]]]) -> None:
    logits = torch.tensor([row for row, _, _ in cases])
    requests = [_request(params, history) for _, params, history in cases]
    together = sample(logits, requests)
    assert together == [sample(logits[row : row + 1], [request])[0] for row, request in enumerate(requests)]


@settings(deadline=None)
@given(_rows, _params, _histories)
def test_the_logits_are_left_as_they_were(row: list[float], params: SamplingParams, history: list[int]) -> None:
    logits = torch.tensor([row])
    sample(logits, [_request(params, history)])
    assert logits.tolist() == [row]


@settings(deadline=None)
@given(_rows)
def test_greedy_takes_the_lowest_id_among_equals(row: list[float]) -> None:
    rounded = [float(round(value / 10)) for value in row]
    for params in (SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, logprobs=2)):
        assert _token(sample(torch.tensor([rounded]), [_request(params)])[0]) == rounded.index(max(rounded))


@settings(deadline=None)
@given(_rows, st.integers(1, 60), st.integers(0, 1000))
def test_top_k_draws_one_of_the_k_best(row: list[float], top_k: int, seed: int) -> None:
    token = _token(sample(torch.tensor([row]), [_request(SamplingParams(top_k=top_k, seed=seed))])[0])
    threshold = sorted(torch.tensor(row).tolist(), reverse=True)[min(top_k, _VOCAB) - 1]
    assert torch.tensor(row).tolist()[token] >= threshold


@settings(deadline=None)
@given(_rows, st.floats(0.01, 1.0), st.integers(0, 1000))
def test_top_p_draws_from_the_smallest_set_of_that_mass(row: list[float], top_p: float, seed: int) -> None:
    token = _token(sample(torch.tensor([row]), [_request(SamplingParams(top_p=top_p, seed=seed))])[0])
    probabilities = torch.tensor(row).double().softmax(-1)
    likelier = probabilities[probabilities > probabilities[token] * (1 + 1e-6)].sum()
    assert likelier < top_p + 1e-6


@pytest.mark.parametrize("vocab", [40, 600])
@pytest.mark.parametrize("params", [{"top_k": 5}, {"top_p": 0.6}, {"top_p": 0.97}, {"min_p": 0.2}])
def test_the_support_is_that_of_transformers(vocab: int, params: dict[str, Any]) -> None:
    """A flat distribution over 600 tokens also reaches the part of top_p that sorts the whole row."""
    torch.manual_seed(3)
    logits = torch.randn(1, vocab) * (2.0 if vocab == 40 else 0.3)
    warper: dict[str, Callable[[Any], LogitsProcessor]] = {
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    ((name, value),) = params.items()
    expected = set(
        warper[name](value)(torch.zeros(1, 1, dtype=torch.long), logits)[0].isfinite().nonzero()[:, 0].tolist()
    )
    draws = 2000 if vocab == 40 else 6000
    found = _support(logits, SamplingParams(temperature=1.0, **params), draws)
    assert found <= expected
    assert len(found) > 0.9 * len(expected)


_limits: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_k": 900},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"min_p": 0.05},
    {"top_k": 600, "top_p": 0.8, "temperature": 1.5},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.1},
]


@pytest.mark.parametrize("vocab", [40, 2600])
@pytest.mark.parametrize("scale", [0.3, 5.0])
@pytest.mark.parametrize("limits", _limits)
def test_every_token_is_drawn_by_its_part_of_the_noise(vocab: int, scale: float, limits: dict[str, Any]) -> None:
    """Both implementations, one row and all rows, against transformers: noise at the middle of a token's part of the
    cumulative distribution draws that token. So none is missing, none too many, and each as likely as it should be."""
    params = SamplingParams(**limits)
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab)) * scale
    scores = TemperatureLogitsWarper(params.temperature)(torch.zeros(1, 1, dtype=torch.long), logits)
    if params.min_p > 0.0:
        scores = MinPLogitsWarper(params.min_p)(torch.zeros(1, 1, dtype=torch.long), scores)
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(torch.zeros(1, 1, dtype=torch.long), scores)
    if params.top_p < 1.0:
        scores = TopPLogitsWarper(params.top_p)(torch.zeros(1, 1, dtype=torch.long), scores)
    probabilities = scores[0].double().softmax(-1)
    middles = probabilities.cumsum(-1) - probabilities / 2
    # What is too unlikely for float32 sums to tell apart is left out, and of very many only some are looked at.
    expected = (probabilities > 1e-5).nonzero()[:, 0]
    expected = expected[:: max(1, len(expected) // 200)].tolist()
    noise = middles[expected].tolist()
    scratch = sample_row.allocate_scratch(vocab)
    assert [sample_row.draw(logits[0], params, u, scratch) for u in noise] == expected
    assert sample_batch.draw(logits.expand(len(noise), -1), [params] * len(noise), noise) == expected


@pytest.mark.parametrize("limits", _limits)
@pytest.mark.parametrize("noise", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_noise_draw_something_likely(noise: float, limits: dict[str, Any]) -> None:
    logits = torch.full((1, 2600), -torch.inf)
    logits[0, 600:1900] = torch.randn(1300, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(**limits)
    token_id = sample_row.draw(logits[0], params, noise, sample_row.allocate_scratch(2600))
    assert token_id is not None
    assert 600 <= token_id < 1900
    assert sample_batch.draw(logits, [params], [noise]) == [token_id]


@pytest.mark.parametrize("limits", [{"top_k": 2}, {"top_p": 0.5}, {"top_k": 2, "top_p": 0.5}, {"min_p": 1.0}])
def test_equal_tokens_stay_or_go_together(limits: dict[str, Any]) -> None:
    logits = torch.zeros(1, 900)
    logits[0, [3, 600, 610, 899]] = 20.0
    assert _support(logits, SamplingParams(**limits), 100) == {3, 600, 610, 899}


def test_frequencies_follow_the_probabilities() -> None:
    """Chi-square of 20,000 draws over 12 tokens, 11 degrees of freedom: 31.3 is exceeded once in a thousand."""
    torch.manual_seed(1)
    logits = torch.randn(1, 12)
    params = SamplingParams(temperature=0.8, top_k=10)
    expected = TemperatureLogitsWarper(0.8)(torch.zeros(1, 1, dtype=torch.long), logits)
    expected = TopKLogitsWarper(10)(torch.zeros(1, 1, dtype=torch.long), expected).softmax(-1)[0].tolist()
    draws = 20_000
    requests = [
        SampleRequest(replace(params, seed=seed), position, (), 0) for seed in range(100) for position in range(200)
    ]
    counts = Counter(_token(result) for result in sample(logits.expand(draws, -1), requests))
    assert set(counts) == {token for token, p in enumerate(expected) if p > 0}
    assert sum((counts[t] - draws * p) ** 2 / (draws * p) for t, p in enumerate(expected) if p > 0) < 31.3


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    torch.manual_seed(2)
    logits = torch.randn(8, _VOCAB) * 3
    for row in range(8):
        history = torch.randint(_VOCAB, (1, 20))
        processed = RepetitionPenaltyLogitsProcessor(penalty)(history, logits[row : row + 1].clone())
        params = SamplingParams(temperature=0.0, repetition_penalty=penalty)
        token = _token(sample(logits[row : row + 1], [_request(params, history[0].tolist(), num_prompt_tokens=12)])[0])
        assert token == int(processed.argmax())


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    logits = torch.zeros(1, 6)
    logits[0, :4] = torch.tensor([3.0, 2.9, 2.8, 2.0])
    history = [0, 0, 0, 1, 2, 2]  # prompt: 0 0 0
    presence = SamplingParams(temperature=0.0, presence_penalty=0.5)
    assert _token(sample(logits, [_request(presence, history, 3)])[0]) == 0
    assert _token(sample(logits, [_request(presence, history, 0)])[0]) == 0
    assert _token(sample(logits, [_request(replace(presence, presence_penalty=2.0), history, 0)])[0]) == 3
    frequency = SamplingParams(temperature=0.0, frequency_penalty=0.4)
    assert _token(sample(logits, [_request(frequency, history, 0)])[0]) == 1  # 3.0 - 1.2, 2.9 - 0.4, 2.8 - 0.8
    assert _token(sample(logits, [_request(frequency, history, 3)])[0]) == 0


def test_logprobs_are_those_of_the_raw_logits() -> None:
    torch.manual_seed(4)
    logits = torch.randn(2, _VOCAB)
    params = SamplingParams(temperature=0.2, top_k=3, repetition_penalty=2.0, logprobs=4, seed=5)
    scores = logits.log_softmax(-1)
    plain = SamplingParams(seed=5)
    results = sample(logits, [_request(params, [1, 2, 3], 1), _request(plain, [1, 2, 3], 1)])
    first, second = results
    assert isinstance(first, SampledToken)
    assert first.logprob is not None
    assert first.logprob.token_id == first.token_id
    assert first.logprob.logprob == pytest.approx(float(scores[0, first.token_id]))
    order = scores[0].argsort(descending=True)[:4].tolist()
    assert [token for token, _ in first.logprob.top] == order
    assert [score for _, score in first.logprob.top] == pytest.approx(scores[0, order].tolist())
    assert isinstance(second, SampledToken)
    assert second.logprob is None


def test_logprobs_rank_equals_by_id_and_may_ask_for_more_than_there_is() -> None:
    entries = logprobs(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), [0, 2], [9, 0])
    assert [token for token, _ in entries[0].top] == [1, 2, 0]
    assert entries[1].top == ()
    assert entries[1].logprob == pytest.approx(-math.log(3))


@pytest.mark.parametrize("count", [1, 4, 30])
def test_the_likeliest_of_many_come_by_score_then_id(count: int) -> None:
    logits = _logits(1, 5003, 0.5, 9)
    (entry,) = logprobs(logits, [17], [count])
    scores = logits[0].log_softmax(-1).tolist()
    order = sorted(range(5003), key=lambda token: (-scores[token], token))[:count]
    assert [token for token, _ in entry.top] == order
    assert [score for _, score in entry.top] == pytest.approx([scores[token] for token in order], abs=1e-5)
    assert entry.logprob == pytest.approx(scores[17], abs=1e-5)


@pytest.mark.parametrize("place", [0, 700, 5002])
def test_one_nan_among_many_numbers_is_seen(place: int) -> None:
    logits = _logits(1, 5003, 3.0, 10)
    logits[0, place] = torch.nan
    for params in (SamplingParams(temperature=0.0), SamplingParams(top_k=3, logprobs=1)):
        assert isinstance(sample(logits, [_request(params)])[0], InternalError)
        assert sample_batch.draw(logits, [params], [0.5]) == [None]
    assert math.isnan(logprobs(logits, [0], [1])[0].logprob)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_logprobs", [None, 2])
def test_a_row_that_is_not_finite_fails_alone(bad: float, temperature: float, num_logprobs: int | None) -> None:
    torch.manual_seed(5)
    logits = torch.randn(3, _VOCAB)
    params = SamplingParams(temperature=temperature, seed=1, logprobs=num_logprobs)
    expected = sample(logits, [_request(params)] * 3)
    logits[1, 7] = bad
    results = sample(logits, [_request(params)] * 3)
    assert isinstance(results[1], InternalError)
    assert [results[0], results[2]] == [expected[0], expected[2]]


def test_minus_infinity_is_never_drawn() -> None:
    logits = torch.full((1, _VOCAB), -torch.inf)
    logits[0, 11] = -3.0
    assert _support(logits, SamplingParams(temperature=5.0)) == {11}


def test_a_temperature_near_zero_is_greedy_without_overflow() -> None:
    torch.manual_seed(6)
    logits = torch.randn(1, _VOCAB) * 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for temperature in (1e-38, 1e-300):
            assert _support(logits, SamplingParams(temperature=temperature)) == {int(logits.argmax())}
            params = SamplingParams(temperature=temperature)
            assert sample_batch.draw(logits, [params], [0.9]) == [int(logits.argmax())]
