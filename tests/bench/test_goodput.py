"""The goodput bench: what decides its figures, and one run against a server that answers at once."""

import gzip
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.goodput.__main__ import main
from bench.goodput.cells import GoodputCell, read_cells
from bench.goodput.curve import (
    LEVELS,
    RatePoint,
    Targets,
    fluidity,
    goodput,
    next_rate,
    rate_point,
    token_times,
)
from bench.goodput.results import curves_of, goodput_table
from bench.goodput.servers import Server, serve_scripted
from bench.goodput.workloads import WORKLOADS
from bench.load.result import LoadRecord
from tandem.core.errors import ConfigError
from tandem.core.slo_file import WorkloadSection
from tandem.profiling.errors import MeasurementError

TARGETS = Targets(ttft_s=1.0, tpot_s=0.1)
MODEL = Path(__file__).parents[2] / "models" / "tiny-python"
NO_DATA = Path("/nonexistent")
delays = st.lists(st.floats(min_value=0.0, max_value=2.0), min_size=1, max_size=30)


def at(rate: float, share: float, requests: int = 100) -> RatePoint:
    return RatePoint(rate, requests, round(share * requests), share, share, share)


def record(ttft_s: float, tpot_s: float, *, tokens: int = 3, error: str | None = None) -> LoadRecord:
    """Of a request that is due at 5 s."""
    token_s = [5.0 + ttft_s + tpot_s * index for index in range(tokens)]
    events = (*token_s, token_s[-1], token_s[-1])  # usage and [DONE]
    return LoadRecord(0, 5.0, 10, tokens, 0, 5.0, token_s[0], token_s[-1], error=error, event_s=events)


# --- attainment, goodput, search ---


def test_attainment_counts_failed_requests_as_missed_and_needs_both_targets() -> None:
    records = [record(0.5, 0.05), record(1.5, 0.05), record(0.5, 0.2), record(0.5, 0.05, error="status 429")]
    point = rate_point(2.0, records, TARGETS)
    assert (point.attainment, point.ttft_met, point.tpot_met) == (0.25, 0.5, 0.5)
    assert point.interval[0] < 0.25 < point.interval[1]
    assert rate_point(2.0, [record(0.5, 0.0, tokens=1)], TARGETS).attainment == 1.0, "one token has no TPOT"


@settings(max_examples=20)
@given(
    st.dictionaries(
        st.floats(min_value=0.1, max_value=100), st.tuples(st.integers(1, 300), st.floats(0, 1)), min_size=1, max_size=6
    ),
    st.sampled_from(LEVELS),
)
def test_goodput_is_met_and_everything_above_its_bracket_is_ignored(
    shares: dict[float, tuple[int, float]], level: float
) -> None:
    points = [at(rate, share, requests) for rate, (requests, share) in shares.items()]
    found = goodput(points, level)
    attainment = {point.rate: point.attainment for point in points}
    assert found.rate == 0.0 or attainment[found.rate] >= level
    if found.missed_at is not None:
        assert attainment[found.missed_at] < level
        assert found.rate < found.missed_at
    surely, surely_missed = found.surely
    assert surely <= found.rate
    assert surely_missed is None or (found.missed_at is not None and found.missed_at <= surely_missed)


@settings(max_examples=30)
@given(st.floats(min_value=0.05, max_value=50), st.floats(min_value=0.05, max_value=50), st.floats(0.05, 0.5))
def test_the_search_finds_the_knee_within_its_tolerance(knee: float, guess: float, tolerance: float) -> None:
    points: list[RatePoint] = []
    while (rate := next_rate(points, 0.9, guess, tolerance)) is not None:
        points.append(at(rate, 1.0 if rate <= knee else 0.0))
        assert len(points) < 30
    found = goodput(points, 0.9)
    assert found.missed_at is not None
    assert found.rate <= knee < found.missed_at <= found.rate * (1 + tolerance) * (1 + 1e-9)


# --- fluidity ---


def test_fluidity_is_that_of_etalon() -> None:
    # The first token is 0.25 s early, which the second may use; the third has no slack and is late; the fourth starts
    # again from there.
    assert fluidity([0.75, 1.125, 1.375, 1.5], Targets(ttft_s=1.0, tpot_s=0.125)) == 0.75
    assert fluidity([], TARGETS) == 0.0


@given(delays)
def test_fluidity_is_1_if_every_gap_keeps_its_target_and_looser_targets_never_lower_it(gaps: list[float]) -> None:
    times = [sum(gaps[: index + 1]) for index in range(len(gaps))]
    share = fluidity(times, TARGETS)
    assert 0.0 <= share <= 1.0
    kept = [min(gap, TARGETS.tpot_s * 0.99) for gap in gaps]
    assert fluidity([sum(kept[: index + 1]) for index in range(len(kept))], TARGETS) == 1.0
    assert fluidity(times, Targets(2 * TARGETS.ttft_s, 2 * TARGETS.tpot_s)) >= share


@given(st.lists(st.floats(0, 10), max_size=40).map(sorted), st.integers(1, 40))
def test_every_token_has_the_time_of_an_event(events: list[float], num_tokens: int) -> None:
    times = token_times((*events, 11.0, 12.0), num_tokens)
    assert len(times) == (num_tokens if events else 0)
    assert times == sorted(times)
    assert set(times) <= set(events)
    if len(events) >= num_tokens:
        assert times == events[:num_tokens]


# --- workloads ---


@pytest.mark.parametrize(("name", "prompt", "output"), [("a", (192, 320), (64, 64)), ("b", (900, 1100), (32, 32))])
def test_lengths_are_those_of_the_workload(name: str, prompt: tuple[int, int], output: tuple[int, int]) -> None:
    stream = WORKLOADS[name].requests(NO_DATA, rate=5.0, seconds=100, seed=1)
    assert len(stream) == 500
    assert stream.rate == pytest.approx(5.0)
    for tokens, (low, high) in ((stream.prompt_tokens, prompt), (stream.output_tokens, output)):
        assert low <= tokens.min() <= tokens.max() <= high


def test_rates_have_the_same_requests_and_bursts_are_bursts() -> None:
    slow = WORKLOADS["c"].requests(NO_DATA, rate=2.0, seconds=50, seed=1)
    fast = WORKLOADS["c"].requests(NO_DATA, rate=4.0, seconds=50, seed=1)
    assert fast.prompt_tokens[: len(slow)].tolist() == slow.prompt_tokens.tolist()
    bursty = WORKLOADS["c"].with_arrivals("bursty").requests(NO_DATA, rate=2.0, seconds=500, seed=1)
    gaps = bursty.arrival_s[1:] - bursty.arrival_s[:-1]
    assert gaps.std() / gaps.mean() > 2
    with pytest.raises(ConfigError, match="no recorded arrivals"):
        WORKLOADS["c"].with_arrivals("recorded").requests(NO_DATA, rate=2.0, seconds=50, seed=1)


@pytest.mark.parametrize("arrivals", ["recorded", "poisson"])
def test_a_trace_keeps_its_lengths_with_any_arrivals(tmp_path: Path, arrivals: str) -> None:
    workload = WORKLOADS["d"].with_arrivals(arrivals)
    with pytest.raises(ConfigError, match="--data"):
        workload.slo_section(tmp_path)
    assert workload.trace is not None
    rows = "".join(f"{i * i},{400 + 4 * i},8\n" for i in range(99))
    (tmp_path / workload.trace).parent.mkdir()
    (tmp_path / workload.trace).write_bytes(gzip.compress(("arrival_s,prompt_tokens,output_tokens\n" + rows).encode()))
    stream = workload.requests(tmp_path, rate=4.0, seconds=10, seed=0)
    assert stream.prompt_tokens.tolist() == [100 + i for i in range(40)]
    assert stream.rate == pytest.approx(4.0)
    assert WorkloadSection.model_validate(workload.slo_section(tmp_path)).trace is not None
    assert (stream.arrival_s[1] / stream.arrival_s[2] == pytest.approx(1 / 4)) == (arrivals == "recorded")


# --- a run ---


def test_a_run_writes_its_cells_and_continues_in_spite_of_a_system_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve(config: Mapping[str, object], settings: Sequence[str] = ()) -> AbstractContextManager[Server]:
        if "prefill" in config:
            raise MeasurementError("it needs more memory")
        return serve_scripted()

    monkeypatch.setattr("bench.goodput.__main__._CLIENT_S", 0.2)
    monkeypatch.setattr("bench.goodput.deployments.serve_tandem", serve)
    command = ["--out", str(tmp_path), "--workloads", "a", "--targets", "60000,10000"]
    command += ["--model", str(MODEL), "--seconds", "0.2"]
    assert main([*command, "--rates", "100", "--systems", "colocated"]) == 0
    assert main([*command, "--rates", "100,200", "--systems", "disaggregated,colocated"]) == 1
    assert "disaggregated FAILED: it needs more memory" in capsys.readouterr().err
    cells = read_cells(tmp_path)
    assert [cell.rate for cell in cells] == [100.0, 200.0]
    assert all(len(cell.records) >= 20 and cell.records[0].is_complete for cell in cells)
    assert all(len(cell.records[0].event_s) == 64 + 2 for cell in cells)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [curve["scale"] for curve in results["curves"]] == [1.0, 0.5]
    assert results["curves"][0]["goodput"]["0.9"]["rate"] == 200.0
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert main([*command, "--seed", "1"]) == 2, "cells of another seed are other requests"


@pytest.mark.slow
def test_it_measures_a_served_cluster(tmp_path: Path) -> None:
    command = ["--out", str(tmp_path), "--workloads", "a", "--systems", "disaggregated", "--targets", "60000,10000"]
    assert main([*command, "--model", str(MODEL), "--rates", "10", "--seconds", "2"]) == 0
    (cell,) = read_cells(tmp_path)
    assert all(record.is_complete for record in cell.records)
    assert min(len(record.event_s) for record in cell.records) > 2


def test_without_vllm_the_command_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.goodput.__main__._CLIENT_S", 0.2)
    command = [
        "--out",
        str(tmp_path),
        "--workloads",
        "a",
        "--model",
        str(MODEL),
        "--vllm-python",
        "/nonexistent/python",
    ]
    assert main(command) == 2
    assert "/nonexistent/python does not exist" in capsys.readouterr().err


def test_a_plan_counts_for_the_targets_that_it_was_made_for() -> None:
    def cell(deployment: str, system: str, scales: tuple[float, ...], rate: float) -> GoodputCell:
        records = tuple(record(0.5, 0.01) for _ in range(20))
        return GoodputCell("a", system, deployment, scales, "", rate, 0, 1.0, "poisson", 1.0, {}, None, 0.0, records)

    cells = [
        cell("planned-1", "planned", (1.0,), 6.0),
        cell("planned-0.5", "planned", (0.5,), 5.0),
        cell("vllm", "vllm", (1.0,), 3.0),
    ]
    curves = curves_of(cells, {"a": {1.0: Targets(1.0, 0.1), 0.5: Targets(0.5, 0.05)}})
    assert [(curve.scale, curve.deployment) for curve in curves] == [
        (1.0, "planned-1"),
        (1.0, "vllm"),
        (0.5, "planned-0.5"),
        (0.5, "vllm"),
    ]
    assert "2.00" in goodput_table(curves).splitlines()[1], "twice vLLM's"
