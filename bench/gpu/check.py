"""Everything of Tandem that needs GPUs, on this machine, within eight minutes: `python -m bench.gpu.check`.

Each check is a process with a time limit. Those that need more GPUs than there are do not run, and the table says so.
Needs the repository's root as the current folder, and the extras of development. The exit status is 0 when all that ran
passed, 1 otherwise, and 2 without a GPU.

Not among them: two ranks on one GPU, for which NCCL before 2.30 has no communicator.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

_TOTAL_S = 480.0
_PYTEST = (sys.executable, "-m", "pytest", "-q", "-m", "gpu")
_LAST_LINES = 5  # of a check's output, that its row shows


@dataclass(frozen=True, slots=True)
class Check:
    """`command` ends with status 0 when all is well."""

    name: str
    num_gpus: int
    limit_s: float
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckResult:
    name: str
    result: Literal["passed", "failed", "too slow", "not run"]
    seconds: float = 0.0
    note: str = ""


def checks(model: Path, folder: Path) -> tuple[Check, ...]:
    """The short ones first. `model`: what is profiled; files are written to `folder`."""
    profile = (sys.executable, "-m", "tandem.cli.main", "profile", str(model), "--device", "cuda", "--no-cluster")
    return (
        Check("engine against transformers", 1, 90, (*_PYTEST, "tests/engine/test_cuda.py")),
        Check("KV blocks over NCCL", 2, 60, (*_PYTEST, "tests/kv_transfer/test_nccl_group.py")),
        Check("colocated instance", 1, 90, (*_PYTEST, "tests/cluster/test_on_gpus.py", "-k", "colocated")),
        Check("prefill and decode, KV over NCCL", 2, 90, (*_PYTEST, "tests/cluster/test_on_gpus.py", "-k", "nccl")),
        Check("instances of two ranks", 2, 120, (*_PYTEST, "tests/cluster/test_on_gpus.py", "-k", "test_an_instance")),
        Check("KV of instances of two ranks", 3, 180, (*_PYTEST, "tests/cluster/test_on_gpus.py", "-k", "test_kv_of")),
        Check(
            "steps of one rank",
            1,
            90,
            (*profile, "--seconds", "15", "--shapes", "none", "-o", str(folder / "one-rank.yaml")),
        ),
        Check(
            "steps of two ranks, sums and messages over NCCL",
            2,
            150,
            (*profile, "--seconds", "15", "--shapes", "2x1,1x2", "-o", str(folder / "two-ranks.yaml")),
        ),
    )


def run_checks(chosen: Sequence[Check], num_gpus: int, total_s: float = _TOTAL_S) -> Iterator[CheckResult]:
    """One after the other. Those for which the time does not suffice do not run."""
    until_s = time.monotonic() + total_s
    for check in chosen:
        if check.num_gpus > num_gpus:
            yield CheckResult(check.name, "not run", note=f"needs {check.num_gpus} GPUs")
        elif (left_s := until_s - time.monotonic()) <= 0:
            yield CheckResult(check.name, "not run", note=f"the {total_s:.0f} s are over")
        else:
            yield _run(check, min(check.limit_s, left_s))


def _run(check: Check, limit_s: float) -> CheckResult:
    began_s = time.monotonic()
    try:
        ended = subprocess.run(
            check.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return CheckResult(check.name, "too slow", time.monotonic() - began_s, f"over {limit_s:.0f} s")
    lines = ended.stdout.strip().splitlines()[-_LAST_LINES:]
    result: Literal["passed", "failed"] = "failed" if ended.returncode else "passed"
    return CheckResult(check.name, result, time.monotonic() - began_s, " | ".join(lines))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/tiny-python"), help="to profile (default: built in)")
    args = parser.parse_args(argv)
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        print("this machine has no CUDA device that torch can use, so nothing was checked", file=sys.stderr)
        return 2
    print(f"{num_gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="tandem-gpu-") as folder:
        for outcome in run_checks(checks(args.model, Path(folder)), num_gpus):
            print(f"{outcome.result:<9} {outcome.seconds:6.1f} s  {outcome.name}  {outcome.note}", flush=True)
            outcomes.append(outcome)
    print(json.dumps([asdict(outcome) for outcome in outcomes]))
    return 1 if any(outcome.result in ("failed", "too slow") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
