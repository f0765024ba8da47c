"""`tandem profile` on the built-in model: a short measurement, its file, and its errors for wrong arguments."""

import re
from pathlib import Path

import pytest

from tandem.cli.main import main
from tandem.core.cost_model import StepLoad
from tandem.core.errors import ConfigError
from tandem.core.parallel import ParallelShape
from tandem.placement.costs.calibration import CalibratedSource, load_calibration


def run(*arguments: str) -> int:
    return main(["profile", *arguments])


def test_the_engine_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "calibration.yaml"
    arguments = ("--no-cluster", "--seconds", "2", "--threads", "1", "--kv-memory", "64MiB", "--shapes", "none")
    assert run(*arguments, "-o", str(path)) == 0
    calibration = load_calibration(path)
    assert calibration.shapes == ()
    assert calibration.model == "tiny-python"
    assert calibration.threads == 1
    assert calibration.request_path is None
    assert calibration.error.median < 1.0
    assert any(cell.prefill_tokens and cell.decode_sequences for cell in calibration.measurements), "mixed steps too"
    cost = CalibratedSource({"cpu": calibration}).cost_model("cpu", ParallelShape())
    assert cost is not None
    # With wide bounds, since the machine may be busy: a prompt costs more than a token, and more than a shorter one.
    assert cost.step(StepLoad.of_prompts(1024)).total_s > 4 * cost.step(StepLoad.of_prompts(32)).total_s
    assert cost.step(StepLoad.of_prompts(1024)).total_s > 4 * cost.step(StepLoad.of_decode(1, 100)).total_s
    text = capsys.readouterr().out
    assert "tiny-python in" in text
    assert f"written to {path}" in text


def test_workers_that_share_cores_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise ConfigError("enough")

    monkeypatch.setattr("tandem.profiling.calibrate.calibrate", stop)
    monkeypatch.setattr("tandem.cli.profile.usable_cores", lambda: 2)
    for threads, options, is_noted in (("2", (), True), ("2", ("--no-cluster",), False), ("1", (), False)):
        assert run("--threads", threads, "-o", str(tmp_path / "c.yaml"), *options) == 2
        assert ("2 threads each, on 2 cores" in capsys.readouterr().err) == is_noted


@pytest.mark.slow
def test_an_instance_of_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "calibration.yaml"
    arguments = ("--no-cluster", "--seconds", "1", "--threads", "1", "--kv-memory", "32MiB", "--shapes", "2x1")
    assert run(*arguments, "-o", str(path)) == 0
    calibration, shape = load_calibration(path), ParallelShape(2)
    (measured,) = calibration.shapes
    assert measured.shape == shape
    assert measured.kv_bytes_per_token == calibration.kv_bytes_per_token / 2
    cost = CalibratedSource({"cpu": calibration}).cost_model("cpu", shape)
    assert cost is not None
    assert cost.step(StepLoad.of_prompts(1024)).total_s > 4 * cost.step(StepLoad.of_prompts(32)).total_s
    assert cost.step(StepLoad.of_decode(1, 100)).collective_s > 0
    (sums,) = calibration.collectives
    assert (sums.operation, sums.ranks) == ("all_reduce", 2)
    assert 0 < sums.cost.latency_s < 1
    pairs = {(one.source, one.destination) for one in calibration.transfers}
    assert {(source.tp, destination.tp) for source, destination in pairs} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert {(source.block_size, destination.block_size) for source, destination in pairs} == {
        (16, 16),
        (16, 32),
        (32, 16),
    }
    text = capsys.readouterr().out
    assert re.search(r"tp2 +\d+\.\d\d times as long as one rank for a prompt of 256 tokens", text)
    assert "sums          between 2 ranks (" in text


@pytest.mark.slow
def test_a_cluster_too(tmp_path: Path) -> None:
    path = tmp_path / "calibration.yaml"
    assert run("--seconds", "15", "--threads", "1", "--kv-memory", "64MiB", "-o", str(path)) == 0
    calibration = load_calibration(path)
    serving = calibration.serving
    cost = CalibratedSource({"cpu": calibration}).cost_model("cpu", ParallelShape())
    assert cost is not None
    prompt_s = cost.step(StepLoad.of_prompts(256)).total_s
    assert 0.3 < serving.prefill_contended.seconds(prompt_s) / prompt_s < 10
    decode_s = cost.step(StepLoad.of_decode(4, 400)).total_s
    assert 0.3 < serving.decode_contended.seconds(decode_s) / decode_s < 10
    request_path = calibration.request_path
    assert request_path is not None
    assert 0 < request_path.admission_s < 1
    assert 0 <= request_path.transfer_alone_s <= request_path.transfer_contended_s < 1
    assert 0 <= request_path.per_concurrent_transfer_s < 1
    assert request_path.transfer_bytes_per_s > 1e6
    assert {shape.shape for shape in calibration.shapes} in ({ParallelShape(2), ParallelShape(1, 2)}, set())
    for shape in calibration.shapes:
        step = shape.serving.decode_alone
        assert 0.3 < step.seconds(decode_s) / decode_s < 10


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--seconds", "0"], "--seconds must be more than 0"),
        (["--seconds", "nan"], "'nan' is not a number of seconds"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--threads", "100000"], "--threads must be at least 1 and at most"),
        (["--kv-memory", "9999999999GiB"], "--kv-memory 9999999999GiB: write a number of bytes"),
        (["--shapes", "2"], "--shapes: '2' is not a shape; write tp x pp, e.g. 2x1, or auto or none"),
        (["--shapes", "1x1,2x1"], "--shapes 1x1,2x1: name shapes of several ranks"),
        (["--shapes", "2x1,2x1"], "each once"),
        (["--kv-memory", "much"], "--kv-memory much: write a number of bytes"),
        (["-o", "/no/such/folder/c.yaml"], "the folder /no/such/folder does not exist"),
        (["-o", "/proc/c.yaml"], "/proc/c.yaml cannot be written ("),
        (["/no/such/model"], "/no/such/model"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) in (1, 2)
    assert complaint in capsys.readouterr().err
