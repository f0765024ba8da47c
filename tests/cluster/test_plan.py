"""An SLO file, `tandem plan`, `tandem serve`, an answer."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem.core.config_file import load_config
from tandem.core.plan import Plan

pytestmark = pytest.mark.unmeasured
ROOT = Path(__file__).parents[2]
PORTS = [f"--set=router.{name}=127.0.0.1:0" for name in ("http", "grpc", "control")]
SLO = """\
model: {model}
cluster: {{nodes: [{{device: cpu, devices: 2}}], kv_memory: 4MiB}}
slo: [{{ttft_s: 0.5, tpot_s: 0.05}}]
workload:
  prompt_tokens: {{mean: 100, cv: 0}}
  output_tokens: {{mean: 10, cv: 0}}
search: {{layouts: [disaggregated], requests: 100}}
"""
READY_S = 120.0


@pytest.mark.timeout(240)
def test_what_was_planned_is_served(built_in_model: Path, tmp_path: Path) -> None:
    slo, plan = tmp_path / "slo.yaml", tmp_path / "plan.yaml"
    slo.write_text(SLO.format(model=built_in_model))
    command = [sys.executable, "-m", "tandem.cli.main", "plan", str(slo), "-o", str(plan), "--workers", "1"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=200)
    kv_tokens = {group.role: group.kv_tokens for group in load_config(plan, Plan).groups}
    with serving(plan, tmp_path) as (url, environment):
        complete(url)
        instances = instances_of(environment)
        assert {instance["role"] for instance in instances} == set(kv_tokens) == {"prefill", "decode"}
        for instance in instances:
            assert instance["blocks"]["total"] == kv_tokens[instance["role"]] // 16, "memory for what the plan expects"


@pytest.fixture(scope="module")
def one_rank_answer(tmp_path_factory: pytest.TempPathFactory) -> str:
    with serving(ROOT / "examples/plan-prompt-first.yaml", tmp_path_factory.mktemp("one-rank")) as (url, _):
        return complete(url)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("plan-*.yaml")), ids=lambda path: path.stem)
def test_every_plan_of_the_examples_is_served(tmp_path: Path, path: Path, one_rank_answer: str) -> None:
    """Of one rank and of several: with the instances and the memory of the plan, and the same answer everywhere."""
    with serving(path, tmp_path) as (url, environment):
        assert {complete(url) for _ in range(6)} == {one_rank_answer}
        instances = instances_of(environment)
        planned = [
            (group.role, group.kv_tokens // 16)
            for group in load_config(path, Plan).groups
            for _ in range(group.instances)
        ]
        assert sorted((one["role"], one["blocks"]["total"]) for one in instances) == sorted(planned)


def instances_of(environment: dict[str, str]) -> list[dict[str, Any]]:
    status = subprocess.run(
        [sys.executable, "-m", "tandem.cli.main", "status", "--json"],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    found: list[dict[str, Any]] = json.loads(status.stdout)["fleet"]["instances"]
    return found


def complete(url: str) -> str:
    body = {"model": "tiny-python", "prompt": "import ", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/completions", json=body, timeout=60.0)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8
    return str(answer.json()["choices"][0]["text"])


@contextlib.contextmanager
def serving(plan: Path, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """`tandem serve` of the plan: the URL of its API, and the environment for other commands."""
    output = folder / "output"
    environment = {**os.environ, "TANDEM_STATE_DIR": str(folder / "state"), "OMP_NUM_THREADS": "1"}
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tandem.cli.main", "serve", "--launcher", "process", str(plan), *PORTS],
            env=environment,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield _wait_for(process, output, r"HTTP +(http://\S+/v1) "), environment
    finally:
        process.send_signal(signal.SIGINT)
        try:
            ended = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert ended == 0, output.read_text()


def _wait_for(process: subprocess.Popen[bytes], output: Path, pattern: str) -> str:
    """The first group of `pattern` in what the process has printed."""
    until_s = time.monotonic() + READY_S
    while time.monotonic() < until_s:
        if match := re.search(pattern, output.read_text()):
            return match[1]
        assert process.poll() is None, output.read_text()
        time.sleep(0.1)
    raise AssertionError(f"{pattern} was never printed:\n{output.read_text()}")
