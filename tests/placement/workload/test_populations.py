"""Distributions, tables and mixtures of lengths, and workloads of several populations."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tandem.core.errors import ConfigError
from tandem.core.slo import SloClass
from tandem.core.slo_file import LengthSection, WorkloadSection
from tandem.placement.workload.description import arrival_cv
from tandem.placement.workload.lengths import Exponential, Pareto, lengths_of
from tandem.placement.workload.requests import Floats, Ints, RequestStream
from tandem.placement.workload.streams import generated_requests, make_stream

GRID: Floats = (np.arange(20_000) + 0.5) / 20_000
CLASSES = (SloClass(name="chat", ttft_s=1, tpot_s=1), SloClass(name="batch", ttft_s=9, tpot_s=1))
POPULATIONS: dict[str, Any] = {
    "populations": [
        {
            "name": "chat",
            "share": 3,
            "prompt_tokens": {"mean": 300},
            "output_tokens": {"mixture": [{"share": 0.6, "mean": 5, "cv": 0.3}, {"share": 0.4, "mean": 500}]},
            "prefix": {"share": 1, "groups": 2, "tokens": 50},
            "slo_class": "chat",
        },
        {
            "name": "batch",
            "share": 1,
            "dataset": "arxiv",
            "arrivals": {"process": "weibull", "cv": 4},
            "prefix": {"share": 0.5, "tokens": 70},
            "slo_class": "batch",
        },
    ]
}


def stream(section: dict[str, Any], count: int = 2000, rate: float = 2.0, seed: int = 0) -> RequestStream:
    return make_stream(WorkloadSection.model_validate(section), CLASSES, count=count, rate=rate, seed=seed)


def drawn(section: dict[str, Any]) -> Ints:
    return lengths_of(LengthSection.model_validate(section))(GRID)


# --- one length ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(low=st.integers(1, 50), mean_ratio=st.floats(1.5, 30), max_ratio=st.floats(2.5, 1e4))
def test_an_exponential_distribution_is_that_of_scipy(low: int, mean_ratio: float, max_ratio: float) -> None:
    mean = low * mean_ratio
    found = Exponential.of_mean(mean, low, mean * max_ratio)
    width, scale = found.high - low, 1 / found.rate
    reference = stats.truncexpon(width / scale, loc=low, scale=scale)
    assert reference.mean() == pytest.approx(mean, rel=1e-4)
    np.testing.assert_allclose(found.quantile(GRID), reference.ppf(GRID), rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(low=st.integers(1, 50), mean_ratio=st.floats(1.5, 30), max_ratio=st.floats(10, 1e4))
def test_a_pareto_distribution_is_that_of_scipy(low: int, mean_ratio: float, max_ratio: float) -> None:
    mean = low * mean_ratio
    try:
        found = Pareto.of_mean(mean, low, mean * max_ratio)
    except ConfigError:
        assert mean * max_ratio < 200 * mean  # the mean of density 1 / length is (max - min) / log(max / min)
        return
    reference = stats.truncpareto(found.exponent, found.high / low, scale=low)
    assert reference.mean() == pytest.approx(mean, rel=1e-4)
    np.testing.assert_array_equal(found.sample(GRID), np.rint(np.minimum(reference.ppf(GRID), np.floor(found.high))))


def test_impossible_means_are_refused() -> None:
    with pytest.raises(ConfigError, match="no exponential distribution between 1 and 100 has the mean 60"):
        drawn({"mean": 60, "max": 100, "distribution": "exponential"})
    with pytest.raises(ConfigError, match=r"no Pareto distribution between 1 and 100 has the mean 30; .* less than 21"):
        drawn({"mean": 30, "max": 100, "distribution": "pareto"})


def test_a_mixture_has_its_parts_in_their_shares() -> None:
    many_short, few_long = {"share": 3, "mean": 5, "cv": 0}, {"share": 1, "mean": 600, "cv": 0.3, "min": 400}
    bimodal = drawn({"mixture": [many_short, few_long]})
    assert np.mean(bimodal == 5) == pytest.approx(0.75, abs=1e-3)
    assert bimodal[bimodal != 5].min() >= 400
    assert bimodal[bimodal != 5].mean() == pytest.approx(600, rel=0.01)


def test_a_table_has_the_weights_of_its_intervals(tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    path.write_text("tokens_from,tokens_to,weight\n1,1,6\n10,19,2\n500,500,0\n1000,1999,2\n")
    lengths = drawn({"table": str(path)})
    assert np.mean(lengths == 1) == pytest.approx(0.6, abs=1e-3)
    middle = lengths[(lengths >= 10) & (lengths <= 19)]
    assert len(middle) / len(lengths) == pytest.approx(0.2, abs=1e-3)
    np.testing.assert_allclose(np.bincount(middle)[10:] / len(middle), 0.1, atol=1e-3)
    assert set(lengths[lengths > 19] >= 1000) == {True}
    path.write_text("tokens\n7\n7\n9\n")
    assert np.mean(drawn({"table": str(path)}) == 7) == pytest.approx(2 / 3, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tokens,weight\n5,1\n0,1\n", "FILE line 3: tokens must be a whole number of at least 1, not '0'"),
        ("tokens,weight\n5,many\n", "FILE line 2: weight must be a number of at least 0, not 'many'"),
        ("tokens_from,tokens_to\n9,5\n", "FILE line 2: tokens_to must be at least tokens_from 9, not 5"),
        ("tokens_from\n9\n", "FILE line 1: there is no column tokens_to, only 'tokens_from'"),
        ("tokens,weight\n9,0\n", "FILE holds no lengths with a weight above 0"),
        ("", "FILE line 1: there is no column tokens; the file is empty"),
    ],
)
def test_mistakes_in_a_table_are_reported_with_their_line(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        drawn({"table": str(path)})
    assert caught.value.message.replace(str(path), "FILE") == sentence


# --- prompts and outputs together ------------------------------------------------------------------------------------


def test_rows_of_a_table_of_requests_stay_together(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text("prompt_tokens,output_tokens,weight\n100,1,9\n20,800,1\n")
    requests = stream({"lengths": str(path)}, count=10_000)
    pairs = set(zip(requests.prompt_tokens.tolist(), requests.output_tokens.tolist(), strict=True))
    assert pairs == {(100, 1), (20, 800)}
    assert np.mean(requests.output_tokens == 800) == pytest.approx(0.1, abs=0.01)


def test_answers_of_longbench_are_of_two_kinds() -> None:
    answers = stream({"dataset": "distserve_longbench"}, count=20_000).output_tokens
    assert answers.std() / answers.mean() == pytest.approx(2.2, abs=0.15)
    assert np.median(answers) < 20
    assert np.quantile(answers, 0.9) > 200


def test_requests_beyond_the_context_are_drawn_again_and_counted() -> None:
    section = WorkloadSection.model_validate({"dataset": "sharegpt"})
    served = generated_requests(section, CLASSES, count=4000, rate=1, seed=0, max_context_tokens=1000)
    whole = stream({"dataset": "sharegpt"}, count=20_000)
    beyond = float(np.mean(whole.prompt_tokens + whole.output_tokens > 1000))
    assert int((served.requests.prompt_tokens + served.requests.output_tokens).max()) <= 1000
    (note,) = served.notes
    assert float(note.partition("%")[0]) == pytest.approx(100 * beyond, abs=1.5)
    assert note.endswith("of requests exceed the context of the model, 1,000 tokens; the server refuses them")
    with pytest.raises(ConfigError, match="almost all requests exceed the context of the model, 3 tokens"):
        generated_requests(section, CLASSES, count=10, rate=1, seed=0, max_context_tokens=3)


# --- populations -----------------------------------------------------------------------------------------------------


def test_populations_keep_their_lengths_arrivals_classes_and_prefixes() -> None:
    together = stream(POPULATIONS, count=40_000, rate=5)
    assert together.arrival_s[0] == 0
    assert together.rate == pytest.approx(5, rel=0.1)
    chat, batch = (together.select(together.slo_class == index) for index in (0, 1))
    assert len(chat) / len(together) == pytest.approx(0.75, abs=0.02)
    assert arrival_cv(chat) == pytest.approx(1, rel=0.05)
    assert arrival_cv(batch) == pytest.approx(4, rel=0.15)
    assert np.mean(chat.output_tokens < 20) == pytest.approx(0.6, abs=0.02)
    assert batch.prompt_tokens.mean() == pytest.approx(2588, rel=0.03)
    assert set(chat.prefix_group.tolist()) == {0, 1}
    assert set(batch.prefix_group.tolist()) == {-1, 2}


def test_populations_are_drawn_from_common_random_numbers() -> None:
    many = stream(POPULATIONS, count=3000)
    for name in (field.name for field in fields(RequestStream)):
        few = getattr(stream(POPULATIONS, count=500), name)
        np.testing.assert_array_equal(few, getattr(many.head(500), name), err_msg=name)
    np.testing.assert_allclose(stream(POPULATIONS, rate=8).arrival_s * 4, stream(POPULATIONS, rate=2).arrival_s)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 300), st.sampled_from([0.1, 1, 30]))
def test_any_populations_give_exactly_the_requests_asked_for(shares: list[float], count: int, cv: float) -> None:
    arrivals = {"process": "gamma", "cv": cv}
    one = {"prompt_tokens": {"mean": 9, "cv": 0}, "output_tokens": {"mean": 9, "cv": 0}, "arrivals": arrivals}
    made = stream({"populations": [one | {"name": str(i), "share": share} for i, share in enumerate(shares)]}, count)
    assert len(made) == count
