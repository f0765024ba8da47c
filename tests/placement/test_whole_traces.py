"""A plan is for the whole trace, however long it is and whatever changes in it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.cli.main import main
from tandem.core.errors import ConfigError
from tandem.core.slo import SloClass
from tandem.core.slo_file import WorkloadSection
from tandem.placement.evaluation.attainment import evaluate_windows
from tandem.placement.evaluation.goodput import stop_when_windows_lost
from tandem.placement.planner import search, search_and_compare
from tandem.placement.search.final_comparison import FinalComparison, compare_finalists
from tandem.placement.search.mapper import SerialMapper
from tandem.placement.search.problem import Problem, without_cached
from tandem.placement.search.trial import MaxRate, evaluate_at, find_max_rate, find_rate_near
from tandem.placement.workload.requests import RequestStream
from tandem.placement.workload.streams import trace_requests
from tandem.placement.workload.windows import windowed
from tests.placement.queues import SingleServer
from tests.placement.search.problems import problem

LIGHT, HEAVY = (100, 10), (500, 40)  # prompt and output tokens


def regimes(*parts: tuple[int, tuple[int, int]], seed: int = 0) -> RequestStream:
    """Requests at a constant rate."""
    count = sum(number for number, _ in parts)
    lengths = np.concatenate([np.tile(np.array(lengths), (number, 1)) for number, lengths in parts])
    gaps_s = np.random.default_rng(seed).exponential(size=count)
    return RequestStream.make(np.cumsum(gaps_s) - gaps_s[0], lengths[:, 0], lengths[:, 1])


def asked(trace: RequestStream, cover: float = 1.0) -> Problem:
    divided, toy = windowed(trace, 100), problem(2, max_tp=1)
    return replace(
        toy,
        requests=divided.stream,
        computed=without_cached(divided.stream).head(100),
        windows=divided.windows,
        cover=cover,
        section=toy.section.model_copy(update={"requests": 100}),
    )


def planned(question: Problem) -> FinalComparison:
    _, comparison = search_and_compare(question, SerialMapper(), lambda share, text: None)
    assert comparison is not None
    return comparison


def test_a_later_regime_counts() -> None:
    """As a user found it: the first 2,000 rows were light, the rest was not looked at."""
    whole = planned(asked(regimes((100, LIGHT), (200, HEAVY))))
    evaluation = evaluate_at(whole.problem, whole.chosen.simulated, False, whole.rate)
    assert evaluation.meets
    assert [of_window.meets for of_window in evaluation.windows] == [True] * 3
    evaluation = evaluate_at(whole.problem, whole.chosen.simulated, False, 2 * whole.rate)
    assert [of_window.meets for of_window in evaluation.windows] == [True, False, False]
    assert not evaluation.meets
    (only,) = evaluate_at(replace(whole.problem, cover=0.3), whole.chosen.simulated, False, 2 * whole.rate).classes
    assert only.attainment == 1.0, "a third of the time is light"


@pytest.mark.slow
def test_a_plan_for_two_regimes_is_that_of_the_heavier_one() -> None:
    whole = planned(asked(regimes((200, LIGHT), (600, HEAVY))))
    heavy, light = planned(asked(regimes((800, HEAVY)))), planned(asked(regimes((800, LIGHT))))
    assert light.goodput > 3 * heavy.goodput
    assert whole.goodput == pytest.approx(heavy.goodput, rel=0.15)


@pytest.mark.slow
def test_a_plan_for_most_of_the_time_may_miss_in_the_rest() -> None:
    trace = regimes((600, LIGHT), (200, HEAVY))
    worst, most = planned(asked(trace)), planned(asked(trace, cover=0.7))
    assert most.goodput > 2 * worst.goodput
    evaluation = evaluate_at(most.problem, most.chosen.simulated, False, most.rate)
    assert evaluation.meets
    met_share = sum(
        window.time_share for window, of in zip(most.problem.windows, evaluation.windows, strict=True) if of.meets
    )
    assert 0.7 <= met_share < 1


def test_the_window_that_decides_is_the_one_with_which_enough_time_is_covered() -> None:
    slo, trace = SloClass(ttft_s=1, tpot_s=1), regimes((300, (10, 1)), (300, (30, 1)), (300, (90, 1)))
    divided = windowed(trace, 300)
    result = SingleServer(token_s=0.02)(divided.stream)
    shares = [
        evaluate_windows(result, (slo,), divided.windows, cover).classes[0].attainment for cover in (0.2, 0.5, 1.0)
    ]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert shares[2] == 0.0


def test_what_the_server_refuses_is_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n3,10,5\n0,900,200\n1,10,0\n2,10.0,5\n4,1300,1\n")
    found = trace_requests(
        WorkloadSection(trace=path), (SloClass(ttft_s=1, tpot_s=1),), seed=0, max_context_tokens=1000
    )
    assert found.requests.arrival_s.tolist() == [0, 1]
    assert found.notes == (
        "1 of 5 requests have no output tokens and are left out",
        "3 of 5 rows are not in order of arrival; they were sorted",
        "2 of 5 requests exceed the context of the model, 1,000; the server refuses them",
    )


def test_a_trace_is_simulated_whole_and_shown_in_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{0.2 * i},{100 if i < 300 else 2000},20\n" for i in range(700)) + "139.8,140000,100\n"
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    (tmp_path / "slo.yaml").write_text(
        "model: Llama-3.1-8B\ncluster: {nodes: [{device: H100-80GB-SXM5, devices: 2}]}\n"
        "slo: [{ttft_s: 0.5, tpot_s: 0.05}]\nworkload: {trace: t.csv}\nsearch: {requests: 200}\n"
    )
    (tmp_path / "plan.yaml").write_text(
        "model: Llama-3.1-8B\nverdict: colocate\nslo_file: slo.yaml\n"
        "groups: [{role: colocated, instances: 1, device: H100-80GB-SXM5, kv_tokens: 300000}]\n"
    )
    assert main(["simulate", str(tmp_path / "plan.yaml"), "--json", str(tmp_path / "run.json")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("700 requests at 5.00 req/s, 700 finished")
    assert "1 of 701 requests exceed the context of the model, 131,072; the server refuses them" in err
    lines = [line.split() for line in out.splitlines() if " s to " in line]
    assert [line[line.index("tokens") - 1] for line in lines] == ["100", "1,450", "2,000"]
    assert "All targets are met." in out
    assert main(["simulate", str(tmp_path / "plan.yaml"), "--requests", "250"]) == 0
    assert capsys.readouterr().out.startswith("250 requests at 5.00 req/s")


def test_the_search_counts_on_a_finite_cache() -> None:
    """Three conversations take turns; a cache for two of them, by the rule of least recent use, has none in time."""
    rows, groups = 30, np.arange(30) % 3
    stream = RequestStream.make(
        np.arange(rows), np.full(rows, 100), np.full(rows, 5), prefix_group=groups, prefix_tokens=np.full(rows, 90)
    )  # fmt: skip
    assert without_cached(stream).prompt_tokens.tolist() == [100] * 3 + [10] * 27
    assert without_cached(stream, cache_tokens=200).prompt_tokens.tolist() == [100] * 30
    assert without_cached(stream, cache_tokens=330).prompt_tokens.tolist() == [100] * 3 + [10] * 27


def test_the_share_of_cached_tokens_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slo.yaml").write_text(
        "model: Llama-3.1-8B\ncluster: {nodes: [{device: H100-80GB-SXM5, devices: 2}]}\n"
        "slo: [{ttft_s: 0.5, tpot_s: 0.05}]\nsearch: {requests: 200}\n"
        "workload: {prompt_tokens: {mean: 1600, cv: 0}, output_tokens: {mean: 5, cv: 0}, rate: 4,"
        " prefix: {share: 0.5, tokens: 800}}\n"
    )
    (tmp_path / "plan.yaml").write_text(
        "model: Llama-3.1-8B\nverdict: colocate\nslo_file: slo.yaml\n"
        "groups: [{role: colocated, instances: 1, device: H100-80GB-SXM5, kv_tokens: 300000}]\n"
    )
    assert main(["simulate", str(tmp_path / "plan.yaml")]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "prefix cache" in line)
    assert 20 < float(line.split()[0]) < 30


def test_a_window_that_meets_its_targets_at_no_rate_is_named() -> None:
    """A third of the last window takes longer than its target on an idle cluster; the search was for the first."""
    question = asked(regimes((200, HEAVY), (70, LIGHT), (30, (3000, 5))))
    result = search(question.of_window(question.windows[0]), SerialMapper(), lambda share, text: None)
    assert result.chosen is not None
    space = replace(result.space, problem=question)
    with pytest.raises(ConfigError) as caught:
        compare_finalists(space, (), result.chosen, SerialMapper(), lambda share, text: None)
    assert "misses the targets there at every rate; loosen the targets of slo, or set workload.cover to 0.6" in str(
        caught.value
    )


@pytest.mark.parametrize("find", [find_rate_near, partial(find_max_rate, at_least=0.0)])
def test_a_short_trace_ends_the_search_for_its_rate(find: Callable[..., MaxRate]) -> None:
    """All its requests are on time in one burst, however fast they come: the search went on without end."""
    question = replace(asked(regimes((30, (10, 2)))), classes=(SloClass(ttft_s=1000.0, tpot_s=1000.0),), windows=())
    deployment = planned(asked(regimes((300, LIGHT)))).chosen.simulated
    found = find(question, deployment, 100.0)
    assert 0 < found.rate < 1000


@settings(max_examples=60, deadline=None)
@given(
    token_s=st.floats(0.0005, 0.01),
    ttft_s=st.floats(0.05, 3.0),
    attainment=st.floats(0.5, 1.0),
    cover=st.sampled_from([0.4, 0.7, 1.0]),
    seed=st.integers(0, 99),
)
def test_a_run_of_windows_is_stopped_only_if_it_is_lost(
    token_s: float, ttft_s: float, attainment: float, cover: float, seed: int
) -> None:
    classes = (SloClass(ttft_s=ttft_s, tpot_s=1, attainment=attainment),)
    divided = windowed(regimes((300, LIGHT), (200, HEAVY), (300, LIGHT), seed=seed), 100)
    stop_when = stop_when_windows_lost(divided.stream, classes, divided.windows, cover)
    server = SingleServer(token_s=token_s)
    if server(divided.stream, stop_when).stopped_early:
        assert not evaluate_windows(server(divided.stream), classes, divided.windows, cover).meets


def test_a_lost_window_ends_the_run() -> None:
    classes = (SloClass(ttft_s=0.5, tpot_s=1),)
    divided = windowed(regimes((200, LIGHT), (200, HEAVY), (800, LIGHT)), 200)
    stop_when = stop_when_windows_lost(divided.stream, classes, divided.windows, 1.0)
    stopped = SingleServer(token_s=0.005)(divided.stream, stop_when)
    assert stopped.stopped_early
    assert stopped.end_s < divided.stream.duration_s / 2
