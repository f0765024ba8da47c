"""Streams of requests have the given moments, and a change of one section leaves the others unchanged."""

import csv
import gzip
import json
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.errors import ConfigError
from tandem.core.slo import SloClass
from tandem.core.slo_file import WorkloadSection
from tandem.placement.workload.datasets import DATASETS
from tandem.placement.workload.description import arrival_cv, shared_share
from tandem.placement.workload.lengths import TruncatedLogNormal
from tandem.placement.workload.requests import RequestStream
from tandem.placement.workload.streams import make_stream
from tandem.placement.workload.traces import load_trace, read_trace

ONE = (SloClass(ttft_s=1, tpot_s=0.1),)
TWO = (SloClass(name="fast", ttft_s=1, tpot_s=0.1, share=3), SloClass(name="slow", ttft_s=9, tpot_s=1))
FIXED = {"prompt_tokens": {"mean": 100, "cv": 0}, "output_tokens": {"mean": 10, "cv": 0}}


def stream(
    section: dict[str, Any], classes: tuple[SloClass, ...] = ONE, *, count: int = 500, rate: float = 2.0, seed: int = 0
) -> RequestStream:
    return make_stream(WorkloadSection.model_validate(section), classes, count=count, rate=rate, seed=seed)


def assert_equal(one: RequestStream, other: RequestStream, *, but: str = "") -> None:
    for name in (field.name for field in fields(RequestStream)):
        if name != but:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


# --- common random numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [FIXED, {"dataset": "sharegpt"}, {"dataset": "distserve_longbench"}])
def test_more_requests_continue_the_same_stream(section: dict[str, Any]) -> None:
    section = section | {"prefix": {"share": 0.5, "groups": 3, "tokens": 20}}
    assert_equal(stream(section, TWO, count=100), stream(section, TWO, count=400).head(100))


def test_another_rate_stretches_the_same_arrivals() -> None:
    slow, fast = stream({"dataset": "sharegpt"}, rate=2), stream({"dataset": "sharegpt"}, rate=8)
    np.testing.assert_allclose(slow.arrival_s, fast.arrival_s * 4)
    assert_equal(slow, fast, but="arrival_s")


def test_arrivals_lengths_and_classes_are_independent() -> None:
    plain = stream({"dataset": "sharegpt"})
    bursty = stream({"dataset": "sharegpt", "arrivals": {"process": "gamma", "cv": 3}})
    assert_equal(plain, bursty, but="arrival_s")
    np.testing.assert_array_equal(plain.arrival_s, stream(FIXED).arrival_s)
    assert_equal(plain, stream({"dataset": "sharegpt"}, TWO), but="slo_class")


def test_the_seed_changes_everything() -> None:
    one, other = stream({"dataset": "sharegpt"}), stream({"dataset": "sharegpt"}, seed=1)
    assert not np.any(one.arrival_s[1:] == other.arrival_s[1:])
    assert np.mean(one.prompt_tokens == other.prompt_tokens) < 0.1


# --- moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrivals", "cv"), [({}, 1.0), ({"process": "gamma", "cv": 3}, 3.0), ({"process": "weibull", "cv": 2}, 2.0)]
)
def test_arrivals_have_their_rate_and_burstiness(arrivals: dict[str, Any], cv: float) -> None:
    many = stream(FIXED | {"arrivals": arrivals}, count=40_000, rate=5)
    assert many.arrival_s[0] == 0
    assert many.rate == pytest.approx(5, rel=0.05)
    assert arrival_cv(many) == pytest.approx(cv, rel=0.05)


def test_classes_have_their_shares() -> None:
    drawn = stream(FIXED, TWO, count=20_000).slo_class
    assert np.mean(drawn == 0) == pytest.approx(0.75, abs=0.01)


@settings(max_examples=40, deadline=None)
@given(mean=st.floats(20, 5000), cv=st.floats(0.05, 2.0), spread=st.floats(2.0, 50.0))
def test_a_truncated_log_normal_has_the_given_moments(mean: float, cv: float, spread: float) -> None:
    low, high = 1.0, mean * spread
    try:
        lengths = TruncatedLogNormal.of_moments(mean, cv, low, high)
    except ConfigError:
        assert cv > 0.3 * (spread - 1) ** 0.5  # refused only near what any distribution on [1, high] can have
        return
    tokens = lengths.sample((np.arange(20_000) + 0.5) / 20_000)
    assert tokens.min() >= low
    assert tokens.max() <= high
    assert tokens.mean() == pytest.approx(mean, rel=0.01)
    assert tokens.std() / tokens.mean() == pytest.approx(cv, rel=0.05, abs=0.01)


def test_an_impossible_cv_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no log-normal of mean 1000 .* has a cv of 0\.3; the maximum is 0\.29"):
        TruncatedLogNormal.of_moments(1000, 0.3, 500, 1500)


def test_a_cv_of_zero_is_a_fixed_length() -> None:
    assert set(stream(FIXED).prompt_tokens.tolist()) == {100}


# --- data sets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [
        ("sharegpt", 245.8, 325.6),  # figures of the sources, of all their rows
        ("openchat", 2340.0, 438.7),
        ("arxiv", 2588.1, 291.4),
        ("humaneval", 171.3, 98.2),
        ("azure_conv", 1154.7, 211.1),
        ("azure_code", 2047.8, 27.9),
        ("azure_2024_conv", 1612.0, 100.0),
        ("azure_2024_code", 2491.0, 18.0),
        ("servegen_r1", 1268.2, 1527.4),
        ("distserve_sharegpt", 755.5, 200.3),  # published means
        ("distserve_longbench", 1738.3, 90.7),
    ],
)
def test_data_sets_have_the_means_of_their_sources(name: str, prompt: float, output: float) -> None:
    many = stream({"dataset": name}, count=30_000)
    assert many.prompt_tokens.mean() == pytest.approx(prompt, rel=0.03)  # ServeGen has a heavy tail
    assert many.output_tokens.mean() == pytest.approx(output, rel=0.07)  # heavy tails


def test_every_data_set_is_listed_above() -> None:
    parameters = test_data_sets_have_the_means_of_their_sources.pytestmark[0].args[1]
    assert {name for name, *_ in parameters} == set(DATASETS)


def test_distserve_recipes_keep_to_their_context() -> None:
    for name, limit in (("distserve_sharegpt", 2047), ("distserve_longbench", 2040)):
        many = stream({"dataset": name}, count=5000)
        assert int((many.prompt_tokens + many.output_tokens).max()) <= limit


def test_an_unknown_data_set_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match="'sharegtp' is unknown; the built-in data sets are sharegpt, openchat"):
        stream({"dataset": "sharegtp"})


def test_lengths_are_scaled_and_long_requests_left_out() -> None:
    whole = stream({"dataset": "sharegpt"})
    small = stream({"dataset": "sharegpt", "length_scale": 0.1})
    np.testing.assert_array_equal(small.prompt_tokens, np.maximum(1, np.rint(whole.prompt_tokens * 0.1)))
    cut = stream({"dataset": "sharegpt", "length_scale": 0.1, "max_total_tokens": 60})
    assert len(cut) == 500
    assert int((cut.prompt_tokens + cut.output_tokens).max()) <= 60
    with pytest.raises(ConfigError, match="max_total_tokens 2 rejects almost all requests"):
        stream({"dataset": "openchat", "max_total_tokens": 2})


def test_the_configured_share_of_requests_has_a_prefix() -> None:
    some = stream(FIXED | {"prefix": {"share": 0.4, "groups": 5, "tokens": 30}}, count=20_000)
    shares = some.prefix_group >= 0
    assert shares.mean() == pytest.approx(0.4, abs=0.015)
    assert set(some.prefix_group[shares].tolist()) == set(range(5))
    assert set(some.prefix_tokens[shares].tolist()) == {30}
    assert set(some.prefix_tokens[~shares].tolist()) == {0}
    assert shared_share(some) == pytest.approx(0.4 * 0.3, abs=0.01)


def test_a_prefix_is_no_longer_than_its_prompt() -> None:
    short = stream({"dataset": "sharegpt", "prefix": {"share": 1, "tokens": 1000}})
    assert np.all(short.prefix_tokens == np.minimum(1000, short.prompt_tokens))


# --- traces ----------------------------------------------------------------------------------------------------------

CSV = "arrival_s,prompt_tokens,output_tokens,slo_class\n10,100,5,slow\n10.5,200,1,fast\n12,50,7,slow\n"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(CSV)
    return path


def test_a_csv_trace_begins_at_zero(trace: Path) -> None:
    loaded = load_trace(trace)
    assert loaded.arrival_s.tolist() == [0, 0.5, 2]
    assert loaded.prompt_tokens.tolist() == [100, 200, 50]
    assert loaded.output_tokens.tolist() == [5, 1, 7]


def test_a_trace_keeps_its_arrivals_classes_and_lengths(trace: Path) -> None:
    made = stream({"trace": str(trace)}, TWO, rate=2)
    assert made.arrival_s.tolist() == [0, 0.25, 1]
    assert made.slo_class.tolist() == [1, 0, 1]
    assert len(stream({"trace": str(trace)}, TWO, count=2)) == 2
    assert len(stream({"trace": str(trace), "max_total_tokens": 110}, TWO)) == 2
    with pytest.raises(ConfigError, match=r"all requests exceed workload\.max_total_tokens 9"):
        stream({"trace": str(trace), "max_total_tokens": 9}, TWO)


def test_azure_traces_as_they_are_published(tmp_path: Path) -> None:
    path = tmp_path / "AzureLLMInferenceTrace_conv.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    loaded = load_trace(path)
    assert loaded.arrival_s == pytest.approx([0, 4.314579])
    assert loaded.prompt_tokens.tolist() == [374, 396]


@pytest.mark.parametrize("zone", ["Europe/Berlin", "UTC"])
def test_times_without_a_zone_are_utc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    """The clock of Berlin skipped from 2 to 3 o'clock in that night."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    path = tmp_path / "night.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-03-31 01:30:00,3,4\n2024-03-31 03:30:00,3,5\n"
        "2024-03-31T04:00:00+00:00,3,6\n2024-03-31T06:30:00+02:00,3,7\n"
    )
    loaded = load_trace(path)
    monkeypatch.undo()
    time.tzset()
    assert loaded.arrival_s.tolist() == [0, 7200, 9000, 10800]


def test_requests_without_output_are_counted_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,5,0\n1,6,2\n2,7,0\n4,8,3\n")
    assert load_trace(path).prompt_tokens.tolist() == [6, 8]
    assert read_trace(path, ()).num_without_output == 2
    assert len(stream({"trace": str(path)})) == 2
    assert caplog.messages == [f"{path}: 2 of 4 requests have no output tokens and are left out"]
    lines = tmp_path / "t.jsonl"
    lines.write_text(
        '{"timestamp": 0, "input_length": 5, "output_length": 0}\n'
        '{"timestamp": 9, "input_length": 6, "output_length": 1}\n'
    )
    assert read_trace(lines, ()).num_without_output == 1


def mooncake(path: Path, rows: list[tuple[int, int, list[int]]]) -> Path:
    lines = [
        json.dumps({"timestamp": ms, "input_length": tokens, "output_length": 2, "hash_ids": ids})
        for ms, tokens, ids in rows
    ]
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines) + "\n")
    return path


def test_mooncake_chains_become_prefix_groups(tmp_path: Path) -> None:
    path = mooncake(
        tmp_path / "trace.jsonl.gz",
        [
            (0, 1100, [1, 2, 3]),
            (1000, 2000, [1, 2, 3, 4]),  # the next turn of the first chat: continues its three blocks
            (2000, 900, [1, 9]),  # shares the first block only
            (3000, 700, [50, 51]),  # nothing in common with anybody
        ],
    )
    loaded = load_trace(path)
    assert loaded.arrival_s.tolist() == [0, 1, 2, 3]
    first, second, third, fourth = loaded.prefix_group.tolist()
    assert first == second == third != -1
    assert fourth == -1
    assert loaded.prefix_tokens.tolist() == [1100, 1536, 512, 0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=12))
def test_groups_never_claim_more_than_the_tree_has(
    tmp_path_factory: pytest.TempPathFactory, paths: list[list[int]]
) -> None:
    """Each path of choices is a prompt; equal leading choices are equal blocks. Two members of a group really share
    the shorter prefix, and no more is shared over all than with the whole tree."""
    ids: dict[tuple[int, ...], int] = {}
    chains = [[ids.setdefault(tuple(path[: i + 1]), len(ids)) for i in range(len(path))] for path in paths]
    folder = tmp_path_factory.mktemp("trace")
    loaded = load_trace(mooncake(folder / "t.jsonl.gz", [(i, 16 * len(c), c) for i, c in enumerate(chains)]))
    for i, chain in enumerate(chains):
        for j, other in enumerate(chains[:i]):
            if loaded.prefix_group[i] == loaded.prefix_group[j] >= 0:
                blocks = int(min(loaded.prefix_tokens[i], loaded.prefix_tokens[j])) // 16
                assert chain[:blocks] == other[:blocks]
    exact = sum(len(chain) for chain in chains) - len(ids)
    claimed = shared_share(loaded) * int(loaded.prompt_tokens.sum()) / 16
    assert claimed <= exact + 1e-9


WRONG_TRACES = {
    "no column": ("arrival_s,tokens\n1,2\n", "FILE line 1: there is no column prompt_tokens, only 'arrival_s, tokens'"),
    "empty": ("", "FILE line 1: there is no column arrival_s; the file is empty"),
    "no rows": ("arrival_s,prompt_tokens,output_tokens\n", "FILE holds no requests"),
    "not a number": (
        "arrival_s,prompt_tokens,output_tokens\n0,1,1\nsoon,1,1\n",
        "FILE line 3: arrival_s must be a number of at least 0, not 'soon'",
    ),
    "negative time": (
        "arrival_s,prompt_tokens,output_tokens\n-1,1,1\n",
        "FILE line 2: arrival_s must be a number of at least 0, not '-1'",
    ),
    "no output": ("arrival_s,prompt_tokens,output_tokens\n0,1,0\n", "FILE holds no requests with output tokens"),
    "negative output": (
        "arrival_s,prompt_tokens,output_tokens\n0,1,-1\n",
        "FILE line 2: output_tokens must be a whole number of at least 0, not '-1'",
    ),
    "short row": (
        "arrival_s,prompt_tokens,output_tokens\n0,1\n",
        "FILE line 2: output_tokens must be a whole number of at least 0, not missing",
    ),
    "unknown class": (
        "arrival_s,prompt_tokens,output_tokens,slo_class\n0,1,1,urgent\n",
        "FILE line 2: slo_class must be one of the SLO classes fast, slow, not 'urgent'",
    ),
    "not a time": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,1\n",
        "FILE line 2: TIMESTAMP must be a date and time, e.g. 2023-11-16 18:15:46.680590, not 'noon'",
    ),
}
WRONG_LINES = {
    "not JSON": ("{}\nhello\n", "FILE line 1: timestamp must be a number of at least 0, not missing"),
    "no object": ("[1]\n", "FILE line 1: is not a JSON object; write one object a line"),
    "garbage": ("hello\n", "FILE line 1: is not a JSON object; write one object a line"),
    "text for a number": (
        '{"timestamp": 0, "input_length": 5.5, "output_length": 1}\n',
        "FILE line 1: input_length must be a whole number of at least 1, not 5.5",
    ),
    "wrong blocks": (
        '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": "abc"}\n',
        "FILE line 1: hash_ids must be a list of whole numbers, not 'abc'",
    ),
    "blocks of no size": (
        '{"timestamp": 0, "input_length": 9000, "output_length": 1, "hash_ids": [1]}\n',
        "FILE: hash_ids must name every block of the prompt, in blocks of one size from 8 to 4,096 tokens",
    ),
}


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [("t.csv", *case) for case in WRONG_TRACES.values()] + [("t.jsonl", *case) for case in WRONG_LINES.values()],
    ids=[*WRONG_TRACES, *WRONG_LINES],
)
def test_mistakes_in_a_trace_are_reported_with_their_line(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        stream({"trace": str(path)}, TWO)
    assert caught.value.message.replace(str(path), "FILE") == sentence


def test_files_that_are_not_traces(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_trace(tmp_path / "none.csv")
    broken = tmp_path / "cut.csv.gz"
    broken.write_bytes(gzip.compress(CSV.encode() * 100)[:60])
    with pytest.raises(ConfigError, match=r"is not a complete \.gz file"):
        load_trace(broken)
    plain = tmp_path / "plain.csv.gz"
    plain.write_text(CSV)
    with pytest.raises(ConfigError, match=r"is not a complete \.gz file"):
        load_trace(plain)
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not text"):
        load_trace(binary)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10**6), st.integers(1, 10**5)), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_any_trace_comes_back_in_order_of_arrival(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("arrival_s", "prompt_tokens", "output_tokens"), *rows])
    loaded = load_trace(path)
    ordered = sorted(rows, key=lambda row: row[0])
    assert loaded.prompt_tokens.tolist() == [prompt for _, prompt, _ in ordered]
    assert loaded.output_tokens.tolist() == [output for *_, output in ordered]
    np.testing.assert_allclose(loaded.arrival_s, [at_s - ordered[0][0] for at_s, *_ in ordered], atol=1e-6)
