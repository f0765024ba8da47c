"""Instances that are there and make no progress: a process that is stopped, a step that hangs."""

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.core.session import InstanceState
from tandem.wire.channels import open_channel
from tests.cluster.harness import Cluster, running_cluster
from tests.cluster.test_membership import answers

pytestmark = pytest.mark.unmeasured
HANGING = "tests.cluster.hanging_worker"


def _until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(0.02)


def _is_serving(address: str) -> bool:
    """What the instance's health service answers."""

    async def ask() -> bool:
        async with open_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    return asyncio.run(ask())


def _takes_work(cluster: Cluster, name: str) -> bool:
    with suppress(StopIteration):
        return cluster.status(name).state is InstanceState.READY
    return False


def _hang(cluster: Cluster, name: str) -> Path:
    switch = cluster.folder / f"{name}.hang"
    switch.touch()
    return switch


def _answers_during(cluster: Cluster, name: str, trouble: Callable[[], object]) -> list[tuple[int, ...]]:
    """The trouble of the instance `name` begins while all decode, or before the first prompt."""

    async def disturbed() -> list[tuple[int, ...]]:
        if name.startswith("prefill"):
            trouble()
        running = asyncio.create_task(answers(cluster))
        if name.startswith("decode"):
            await asyncio.sleep(0.2)
            trouble()
        assert not running.done(), "the trouble came too late to matter"
        return await running

    return asyncio.run(disturbed())


@pytest.mark.timeout(180)
def test_a_stopped_and_a_hanging_instance_change_no_token(built_in_model: Path, tmp_path: Path) -> None:
    """Faults A2 and A3. Nothing of either instance is closed, so only missing progress tells."""
    with running_cluster(
        built_in_model, tmp_path, num_prefill=2, decode_transports=("auto", "auto"), worker_module=HANGING
    ) as cluster:
        undisturbed = asyncio.run(answers(cluster))
        for name in ("decode-0", "prefill-0"):
            process = cluster.processes[name]
            assert _answers_during(cluster, name, partial(process.send_signal, signal.SIGSTOP)) == undisturbed
            assert not _takes_work(cluster, name)
            process.send_signal(signal.SIGCONT)
            _until(partial(_takes_work, cluster, name), 10.0)
        for name in ("decode-1", "prefill-1"):
            address = cluster.status(name).address
            assert _is_serving(address)
            assert _answers_during(cluster, name, partial(_hang, cluster, name)) == undisturbed
            assert cluster.status(name).state is InstanceState.STALLED
            assert cluster.status(name).step_age_s >= 1.0
            assert not _is_serving(address)
            _hang(cluster, name).unlink()
            _until(partial(_takes_work, cluster, name), 10.0)
            assert _is_serving(address)
        assert asyncio.run(answers(cluster, 10)) == [tokens[:10] for tokens in undisturbed]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_step_that_never_ends_is_the_end_of_the_process(built_in_model: Path, tmp_path: Path) -> None:
    with running_cluster(
        built_in_model, tmp_path, decode_transports=("auto", "auto"), worker_module=HANGING
    ) as cluster:
        undisturbed = asyncio.run(answers(cluster))
        assert _answers_during(cluster, "decode-0", partial(_hang, cluster, "decode-0")) == undisturbed
        process = cluster.processes.pop("decode-0")
        assert process.wait(120) == 1  # after 10 s; longer where looks come late
        assert "a step of decode-0-" in cluster.log_path("decode-0").read_text()
        cluster.wait_ready(1, 1)
