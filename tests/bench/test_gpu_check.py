"""The list of checks on GPUs, on a machine without one."""

import sys

import pytest
import torch

from bench.gpu.check import Check, main, run_checks


def test_without_a_gpu_it_says_so_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main([]) == 2
    assert capsys.readouterr().err == "this machine has no CUDA device that torch can use, so nothing was checked\n"


def test_each_check_has_an_outcome() -> None:
    def check(name: str, code: str, num_gpus: int = 1, limit_s: float = 30.0) -> Check:
        return Check(name, num_gpus, limit_s, (sys.executable, "-S", "-c", code))

    chosen = (
        check("good", "print('all well')"),
        check("bad", "print('a'); print('the reason'); raise SystemExit(3)"),
        check("hangs", "import time; time.sleep(60)", limit_s=0.2),
        check("for others", "", num_gpus=2),
    )
    outcomes = list(run_checks(chosen, num_gpus=1))
    assert [(one.name, one.result, one.note) for one in outcomes] == [
        ("good", "passed", "all well"),
        ("bad", "failed", "a | the reason"),
        ("hangs", "too slow", "over 0 s"),
        ("for others", "not run", "needs 2 GPUs"),
    ]
    assert [one.result for one in run_checks(chosen[:1], num_gpus=1, total_s=0.0)] == ["not run"]
