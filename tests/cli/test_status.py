import asyncio
import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tandem.cli import status
from tandem.cli.explain import _ask
from tandem.cli.main import main
from tandem.cli.output import print_rich
from tandem.cli.router_file import find_router
from tandem.cli.status import _look, _show, as_json, as_parts
from tandem.core.errors import ConfigError
from tandem.core.replanning import DriftState, Proposal, ReplanStatus, WorkloadChange
from tandem.core.session import BlockCounts, InstanceState, InstanceStatus, LinkStats, Role
from tandem.core.workload_profile import ProfileSnapshot
from tandem.deploy.run_state import RunState
from tandem.v1 import worker_pb2_grpc
from tandem.wire.fleet import FleetDescription, FleetServicer
from tandem.wire.server import bind, build_server
from tests.cli.terminal import Terminal
from tests.wire.test_fleet import FakeRegistry

RUN = RunState(7, 1.0, "tiny", "127.0.0.1:8000", "127.0.0.1:8001", "127.0.0.1:8002", "secret", "/logs", "/ray")


def instance(role: Role, **changes: object) -> InstanceStatus:
    values: dict[str, object] = {
        "instance_id": f"{role.value}-1",
        "role": role,
        "state": InstanceState.READY,
        "address": "127.0.0.1:4000",
        "model": "tiny",
        "fingerprint": "f",
        "max_model_len": 2048,
        "block_size": 16,
        "blocks": BlockCounts(total=100, free=90, running=4, cached=5, leased=1),
        "waiting_requests": 2,
        "running_requests": 3,
        "uncomputed_tokens": 30,
        "unreserved_tokens": 10,
        "links": (LinkStats("peer-1", "shared_memory", 4, 2 * 10**9, 0.5, 1),),
    }
    return InstanceStatus(**{**values, **changes})  # type: ignore[arg-type]


FLEET = FleetDescription(
    model="tiny",
    uptime_s=3725.0,
    instances=(instance(Role.DECODE, steps=10, step_s=0.02), instance(Role.PREFILL)),
    running_requests=3,
    queued_requests=1,
)


def shown(capsys: pytest.CaptureFixture[str], fleet: FleetDescription) -> str:
    """What `tandem status` prints into a pipe."""
    print_rich(*as_parts(RUN, fleet))
    return capsys.readouterr().out.removesuffix("\n")


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, FLEET).splitlines()
    assert lines[0] == "tiny: up 1 h 2 min, 3 running, 1 queued (pid 7)"
    assert "http://127.0.0.1:8000/v1" in lines[1]
    prefill, decode = lines[5], lines[6]
    assert prefill.startswith(
        "prefill-1  prefill  ready  2 (40 tokens)  3        10/100 (4 running, 5 cached, 1 leased)  0"
    )
    assert decode.split()[-3:] == ["10", "2.0", "127.0.0.1:4000"]
    assert lines[-1].split() == ["peer-1", "decode-1", "shared_memory", "4", "2.00", "GB", "4.00", "GB/s", "1"]
    assert sum("shared_memory" in line for line in lines) == 1, "one link, though both ends report it"


def test_a_codec_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    coded = instance(Role.DECODE, links=(LinkStats("peer-1", "gloo", 4, 100, 0.5, 1, codec="fp8"),))
    assert "gloo, fp8" in shown(capsys, replace(FLEET, instances=(coded,)))


async def test_a_router_that_was_started_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server, _ = build_server("secret")
    worker_pb2_grpc.add_FleetServiceServicer_to_server(FleetServicer(FakeRegistry()), server)
    control = bind(server, "127.0.0.1:0")
    await server.start()
    (tmp_path / "token").write_text("secret")
    file = tmp_path / "router.yaml"
    file.write_text(f"model: m\nrouter: {{control: {control}}}\ncluster_token: file:token\n")
    run = find_router(None, file)
    try:
        await _look(lambda: run, partial(_show, False))
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "tiny: up 2 s, 3 running, 1 queued"
        assert lines[1].split()[-2:] == ["control", control]
        assert await _ask(run, "r") == "all of 'r'"
    finally:
        await server.stop(None)
    file.write_text("model: m\nrouter: {control: '127.0.0.1:0'}\n")
    with pytest.raises(ConfigError, match=r"leaves the port of router.control to the system"):
        find_router(None, file)


def test_leaked_blocks_are_shouted(capsys: pytest.CaptureFixture[str]) -> None:
    leaking = instance(Role.DECODE, blocks=BlockCounts(total=9, free=1, running=0, cached=0, leased=0, leaked=8))
    fleet = FleetDescription("tiny", 1.0, (leaking,), 0, 0)
    assert "8 LEAKED" in shown(capsys, fleet)


def test_no_worker_yet(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, FleetDescription("tiny", 61.0, (), 0, 0)).endswith("no worker has reported yet")


def test_json_is_whole_and_has_no_token() -> None:
    text = as_json(RUN, FLEET)
    assert "secret" not in text
    data = json.loads(text)
    assert data["run"]["http"] == "127.0.0.1:8000"
    assert data["fleet"]["instances"][0]["role"] == "decode"
    assert data["fleet"]["instances"][0]["links"][0]["transport"] == "shared_memory"
    assert data["fleet"]["instances"][1]["blocks"]["cached"] == 5


PROFILE = ProfileSnapshot(
    window=2,
    window_s=300.0,
    arrivals=600,
    arrival_cv=1.5,
    finished=590,
    arrival_s=(0.0, 1.0),
    prompt_tokens=tuple(range(1, 101)),
    output_tokens=(7,) * 100,
    cached_tokens=(5, 0) * 50,
    slo_class=(0,) * 100,
)
REPLAN = ReplanStatus(
    DriftState.PROPOSED,
    (WorkloadChange("rate", 1.5, 2.0, 0.0), WorkloadChange("prompt_tokens", 755.5, 50.5, 3.2)),
    "another plan would gain +25%",
    Proposal("Two colocated.", ("colocated tp1 on cpu: 1 -> 2",), 0.25, "/logs/replan-1"),
)


def test_requests_and_the_plan_that_they_are_compared_with(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, replace(FLEET, profile=PROFILE, replan=REPLAN)).splitlines()
    profile = next(line for line in lines if line.startswith("requests of"))
    assert profile == (
        "requests of 5 min 0 s: 2.00/s, prompts of 50 (p50 51, p90 91) tokens (5% cached), answers of 7 (p50 7, p90 7)"
    )
    assert "plan: proposed; another plan would gain +25%" in lines
    assert ["prompt_tokens", "755.5", "50.5", "3.20"] in [line.split() for line in lines]
    assert "proposal: gain +25%. Two colocated." in lines
    assert lines[-2:] == ["  colocated tp1 on cpu: 1 -> 2", "  plan and report in /logs/replan-1"]


def test_a_plan_without_requests_yet(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, replace(FLEET, replan=ReplanStatus(DriftState.STABLE, note="nothing yet"))).splitlines()
    assert lines[-1] == "plan: stable; nothing yet"


def test_json_has_the_profile_in_brief() -> None:
    fleet = json.loads(as_json(RUN, replace(FLEET, profile=PROFILE, replan=REPLAN)))["fleet"]
    assert fleet["profile"]["rate"] == 2.0
    assert fleet["profile"]["prompt_tokens"] == {"mean": 50.5, "p50": 51, "p90": 91}
    assert fleet["replan"]["state"] == "proposed"
    assert fleet["replan"]["proposal"]["changes"] == ["colocated tp1 on cpu: 1 -> 2"]
    assert json.loads(as_json(RUN, FLEET))["fleet"]["profile"] is None


@pytest.fixture
def looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tandem status` finds the cluster twice; then the user presses Ctrl-C."""
    fleets = iter((FLEET, replace(FLEET, uptime_s=3726.0)))

    async def fetch(control: str, token: str, tls: None, *, with_profile: bool) -> FleetDescription:
        fleet = next(fleets, None)
        if fleet is None:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60.0)
        assert fleet is not None, "Ctrl-C ends it before the cluster answers"
        return fleet

    monkeypatch.setattr(status, "find_router", lambda pid, file: RUN)
    monkeypatch.setattr(status, "fetch_fleet", fetch)


@pytest.mark.usefixtures("looked_at_twice")
def test_watching_ends_well_with_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--watch", "--interval", "0.1"]) == 0
    out = capsys.readouterr().out
    assert out.count("tiny: up 1 h 2 min") == 2
    assert "\033" not in out


@pytest.mark.usefixtures("looked_at_twice")
def test_watching_for_programs_is_an_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--watch", "--interval", "0.1", "--json"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["fleet"]["uptime_s"], second["fleet"]["uptime_s"]) == (3725.0, 3726.0)


@pytest.mark.usefixtures("looked_at_twice")
def test_watching_on_a_terminal_replaces_what_was_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(["status", "--watch", "--interval", "0.1"]) == 0
    shown = terminal.getvalue()
    assert "\033[32mready" in shown
    assert "\033[1A" in shown, "the cursor goes back up"
    assert shown.endswith("\033[?25h"), "the cursor is visible again"


def test_lines_for_a_pipe_are_not_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capsys, replace(FLEET, instances=(instance(Role.DECODE, instance_id="decode-" + 200 * "x"),)))
    assert "decode-" + 200 * "x" + "  decode  ready" in text
    assert "\033" not in text
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_a_narrow_terminal_keeps_names_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setattr("sys.stdout", terminal)
    print_rich(*as_parts(RUN, replace(FLEET, instances=(instance(Role.DECODE, instance_id="decode-9d780110"),))))
    assert "decode-9d780110" in terminal.getvalue()
    assert "127.0.0.1:4000" in terminal.getvalue()
