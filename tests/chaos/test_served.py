"""What `tandem serve` does for requests that run: its processes, Ray, and itself are killed and stopped."""

import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tandem import Client
from tandem.core.errors import UnavailableError
from tests.chaos.answers import Answer, answer, asks, tokens_of
from tests.chaos.faults import until
from tests.cli.served import Served, family_of, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FOUND_WITHIN_S = 2.0
MARGIN_S = 2.0
REPLACED_WITHIN_S = 90.0  # Python, torch and the model are loaded
RAY_IS_BACK = "Ray: up again"
RAY_WITHIN_S = 180.0  # its own processes take a minute where every core is busy


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="c") as folder:  # Ray's sockets need a short path
        engine = [f"--set={role}.engine.threads=1" for role in ("prefill", "decode")]
        with serving(Path(folder), "--set=prefill.instances=2", "--set=decode.instances=2", *engine) as served:
            yield served


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    """Of a cluster that is whole; and whole and idle again afterwards, every block with an owner."""
    with Client(served.grpc) as made:
        yield made
    try:
        until(lambda: _metric(served, "tandem_instance_up") == 4, REPLACED_WITHIN_S, "all instances are there")
    except AssertionError as error:
        raise AssertionError(f"{error}:\n{served.output.read_text()}") from error
    until(lambda: _metric(served, "tandem_kv_blocks", owner="running") == 0, 5.0, "no block is used")
    assert _metric(served, "tandem_kv_blocks", owner="leased") == 0
    assert _metric(served, "tandem_kv_blocks", owner="leaked") == 0
    assert _metric(served, "tandem_running_requests") == 0


def _running(client: Client) -> tuple[list[Answer], list[tuple[int, ...]]]:
    """Requests in the middle of their answers, and what these must be."""
    wanted = asks(4, max_tokens=2500)
    undisturbed = tokens_of(client, wanted)
    running = answer(client, wanted)
    until(lambda: all(len(each.tokens) > 4 for each in running), 10.0, "all decode")
    assert not any(each.is_done for each in running)
    return running, undisturbed


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("name", ["prefill-1", "decode-1"])
def test_a_worker_is_replaced_under_load(name: str, number: signal.Signals, served: Served, client: Client) -> None:
    running, undisturbed = _running(client)
    pid = _pid(served, name)
    failed_s = time.monotonic()
    os.kill(pid, number)
    assert [each.wait() for each in running] == undisturbed
    assert max(each.longest_gap_s(failed_s) for each in running) < FOUND_WITHIN_S + MARGIN_S
    attempts = {each.num_attempts for each in running}
    assert attempts == ({1} if name == "prefill-1" else {1, 2})
    until(lambda: _pid(served, name) != pid, REPLACED_WITHIN_S, "another one runs")
    until(lambda: not _runs(pid), 5.0, "the old one has ended")


def test_a_stopped_router_is_replaced(served: Served, client: Client) -> None:
    running, undisturbed = _running(client)
    pid = _pid(served, "router")
    failed_s = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    for each in running:
        with pytest.raises(UnavailableError):
            each.wait()
    assert time.monotonic() - failed_s < FOUND_WITHIN_S + MARGIN_S
    until(lambda: _pid(served, "router") != pid, REPLACED_WITHIN_S, "another one runs")
    until(lambda: _metric(served, "tandem_instance_up") == 4, 10.0, "its workers report to it")
    with Client(served.grpc) as new_client:
        assert tokens_of(new_client, [each.ask for each in running]) == undisturbed


def test_a_stopped_controller_stops_no_request(served: Served, client: Client) -> None:
    """A worker that dies meanwhile is replaced afterwards."""
    running, undisturbed = _running(client)
    pid = _pid(served, "decode-1")
    os.kill(served.process.pid, signal.SIGSTOP)
    try:
        os.kill(pid, signal.SIGKILL)
        assert [each.wait() for each in running] == undisturbed
        assert tokens_of(client, asks(8)) == tokens_of(client, asks(8))
        assert _pid(served, "decode-1") == pid
    finally:
        os.kill(served.process.pid, signal.SIGCONT)
    until(lambda: _pid(served, "decode-1") != pid, REPLACED_WITHIN_S, "another one runs")


@pytest.mark.parametrize("server", ["gcs_server", "raylet"])
def test_a_dead_ray_stops_no_request(server: str, served: Served, client: Client) -> None:
    running, undisturbed = _running(client)
    before = {name: _pid(served, name) for name in ("router", "prefill-0", "prefill-1", "decode-0", "decode-1")}
    (victim,) = [process for process in family_of(served.process.pid) if process.name() == server]
    restarts = served.output.read_text().count(RAY_IS_BACK)
    victim.kill()
    assert [each.wait() for each in running] == undisturbed
    assert [each.num_attempts for each in running] == [1] * len(running)
    until(lambda: served.output.read_text().count(RAY_IS_BACK) > restarts, RAY_WITHIN_S, "another Ray runs")
    running_servers = {each.pid for each in family_of(served.process.pid) if each.name() == server}
    assert len(running_servers - {victim.pid}) == 1
    assert {name: _pid(served, name) for name in before} == before
    assert tokens_of(client, [each.ask for each in running]) == undisturbed


def _pid(served: Served, name: str) -> int:
    """Of the process that `tandem serve` last said to be up as `name`."""
    found = re.findall(rf"^\s+{name}\S* up in \S+ s \(pid (\d+)\)", served.output.read_text(), re.MULTILINE)
    assert found, f"{name} was never up"
    return int(found[-1])


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _metric(served: Served, name: str, **labels: str) -> float:
    page = httpx.get(f"http://{served.http}/metrics", timeout=5.0).text
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in page.splitlines()
        if line.startswith((f"{name}{{", f"{name} ")) and all(f'{k}="{v}"' in line for k, v in labels.items())
    )
