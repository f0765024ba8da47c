"""`tandem profile` on the built-in model: a short measurement, its file, and its errors for wrong arguments."""

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
    assert run("--no-cluster", "--seconds", "2", "--threads", "1", "--kv-memory", "64MiB", "-o", str(path)) == 0
    calibration = load_calibration(path)
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


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--seconds", "0"], "--seconds must be more than 0"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--kv-memory", "much"], "--kv-memory much: write a number of bytes"),
        (["-o", "/no/such/folder/c.yaml"], "there is no folder /no/such/folder"),
        (["/no/such/model"], "/no/such/model"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) in (1, 2)
    assert complaint in capsys.readouterr().err
