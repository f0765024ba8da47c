import asyncio
import os
from pathlib import Path
from typing import NoReturn

import pytest

from tandem.cli import doctor
from tandem.cli.main import main
from tandem.core.config import ServeConfig
from tandem.core.errors import UnavailableError
from tandem.core.session import BlockCounts, InstanceState, InstanceStatus, LinkStats, Role
from tandem.deploy import host_checks
from tandem.deploy.finding import Finding, Grade
from tandem.deploy.link_check import check_links
from tandem.deploy.run_state import RunState, StateFolders, process_started_s
from tandem.deploy.settings_checks import check_memory
from tandem.deploy.topology import Machine
from tandem.models.random_checkpoint import CheckpointShape, write_random_checkpoint

PORTS = [f"--set=router.{name}=127.0.0.1:0" for name in ("http", "grpc", "control")]
SMALL = ["--set=prefill.engine.kv_memory=1MiB", "--set=decode.engine.kv_memory=1MiB"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "model", CheckpointShape())


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_STATE_DIR", str(tmp_path / "state"))


def findings(lines: str) -> dict[str, str]:
    """subject -> grade, of what doctor has printed."""
    graded = [line.split(maxsplit=1) for line in lines.splitlines() if line.startswith(("ok", "warning", "FAILED"))]
    return {text.split(":")[0]: grade for grade, text in graded}


def test_a_sound_machine_and_model(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether the project itself is installed is the checkout's business, not this test's.
    monkeypatch.setattr(host_checks, "check_packages", lambda: Finding("packages", Grade.OK, ""))
    assert main(["doctor", f"--set=model={model}", *PORTS, *SMALL]) == 0
    out = capsys.readouterr().out
    assert set(findings(out).values()) <= {"ok", "warning"}
    assert {"python", "memory", "ray", "model", "tokenizer", "shared memory", "gloo"} <= set(findings(out))
    assert out.endswith("all checks passed\n")


def test_a_truncated_checkpoint(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["doctor", f"--set=model={model}", *PORTS, *SMALL]) == 1
    out = capsys.readouterr().out
    assert findings(out)["model"] == "FAILED"
    assert "is truncated" in out
    assert "-> choose another model with --set model=FOLDER, or repair this one" in out


def test_a_tokenizer_that_is_none(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "tokenizer.json").write_text("{}")
    assert main(["doctor", f"--set=model={model}", *PORTS, *SMALL]) == 1
    assert findings(capsys.readouterr().out)["tokenizer"] == "FAILED"


def test_more_memory_than_there_is(model: Path) -> None:
    config = ServeConfig(model=model)
    assert check_memory(config, Machine(cores=2), available_bytes=2 << 30).grade is Grade.OK
    finding = check_memory(config, Machine(cores=2), available_bytes=1 << 30)
    assert finding.grade is Grade.FAILED
    assert finding.text == "1.0 GiB of KV pools and 0.0 GiB of weights, 1.0 GiB available"


def test_packages_that_are_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        "numpy>=999",
        "surely-not-there>=1",
        "torch>=1",
        "absent-too; extra == 'serve'",
        "pytest>=999; extra == 'dev'",
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: wanted)
    finding = host_checks.check_packages()
    assert finding.grade is Grade.FAILED
    assert finding.text.endswith("does not satisfy >=999; surely-not-there is missing; absent-too is missing")


def test_an_old_cpu(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags : fpu sse2\n")
    cpu = next(iter(host_checks.check_cpu(tmp_path / "cpuinfo")))
    assert cpu.grade is Grade.WARNING or "no vector extension known" in cpu.text


def status(transport: str, leaked: int = 0, failures: int = 0) -> InstanceStatus:
    return InstanceStatus(
        instance_id="decode-1",
        role=Role.DECODE,
        state=InstanceState.READY,
        address="127.0.0.1:1",
        model="m",
        fingerprint="f",
        max_model_len=8,
        block_size=16,
        blocks=BlockCounts(total=8, free=8 - leaked, running=0, cached=0, leased=0, leaked=leaked),
        waiting_requests=0,
        running_requests=0,
        uncomputed_tokens=0,
        unreserved_tokens=0,
        links=(LinkStats("prefill-1", transport, 3, 100, 0.1, failures),),
    )


def test_a_slow_transport_is_an_error() -> None:
    (finding,) = check_links([status("gloo")], "shared_memory")
    assert finding.grade is Grade.FAILED
    assert finding.text == "prefill-1 -> decode-1 uses the transport gloo"
    assert "shared_memory was expected" in finding.advice
    assert [f.grade for f in check_links([status("gloo")], None)] == [Grade.OK]
    assert [f.grade for f in check_links([status("shared_memory", failures=1)], None)] == [Grade.WARNING]


def test_leaked_blocks_are_an_error() -> None:
    grades = [finding.grade for finding in check_links([status("gloo", leaked=2)], None)]
    assert grades == [Grade.FAILED, Grade.OK]


def test_a_run_whose_router_does_not_answer(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = StateFolders.of_environment(os.environ)
    folders.make()
    pid = os.getpid()
    dead = "127.0.0.1:1"
    run = RunState(pid, process_started_s(pid), "m", dead, dead, dead, "t", str(tmp_path), str(tmp_path / "ray"))
    folders.write(run)
    assert main(["doctor", f"--set=model={model}", *PORTS, *SMALL]) == 1
    out = capsys.readouterr().out
    assert findings(out)["cluster"] == "FAILED"
    assert f"it may still be loading; its logs are in {tmp_path}" in out


def test_clusters_are_asked_on_one_event_loop(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loops = []

    async def fetch_fleet(*_: object) -> NoReturn:
        loops.append(asyncio.get_running_loop())
        raise UnavailableError("it is gone")

    monkeypatch.setattr(doctor, "fetch_fleet", fetch_fleet)
    monkeypatch.setattr(host_checks, "check_gloo", lambda: Finding("gloo", Grade.OK, ""))
    run = RunState(1, 0.0, "m", "127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:1", "t", "logs", "ray")
    list(doctor.examine(ServeConfig(model=model), [run, run], doctor.ClientAccess(), None))
    assert len(loops) == 2
    assert loops[0] is loops[1]
