"""The router process: its three ports, its health, its end."""

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import grpc
import httpx
import pytest
import uvicorn
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.core.config import RouterConfig
from tandem.core.errors import CheckpointError, ConfigError, InternalError
from tandem.core.router_section import RouterSection
from tandem.router.app import RouterApp
from tandem.v1 import inference_pb2, inference_pb2_grpc
from tandem.wire.channels import open_channel
from tandem.wire.fleet import describe_fleet
from tests.router.fakes import until
from tests.router.grpc_workers import serve_pair

T = TypeVar("T")

TOKEN = "secret"
ANY_PORT = "127.0.0.1:0"
PROMPT = {"model": "tiny", "prompt": "hello", "max_tokens": 9, "ignore_eos": True}


def make_config(model: Path, **ports: str) -> RouterConfig:
    section = RouterSection(**({"http": ANY_PORT, "grpc": ANY_PORT, "control": ANY_PORT} | ports))
    return RouterConfig(model=model, model_name="tiny", router=section, cluster_token=TOKEN)


@asynccontextmanager
async def running_router(model: Path) -> AsyncIterator[RouterApp]:
    app = RouterApp(make_config(model))
    await app.start()
    try:
        yield app
    finally:
        await app.drain_and_stop(0.0)


async def health_of(app: RouterApp) -> int:
    async with open_channel(app.grpc_address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    return int(answer.status)


async def poll(ask: Callable[[], Awaitable[T]], is_met: Callable[[T], bool]) -> None:
    """Ask again and again until the answer is as wanted."""
    async with asyncio.timeout(10):
        while not is_met(await ask()):  # noqa: ASYNC110 - what is waited for is in the answer
            await asyncio.sleep(0.01)


async def wait_for_pair(http: httpx.AsyncClient) -> None:
    await poll(lambda: http.get("/health"), lambda answer: answer.status_code == 200)


async def test_serves_http_and_grpc_once_a_pair_is_there(checkpoint: Path) -> None:
    async with (
        running_router(checkpoint) as app,
        httpx.AsyncClient(base_url=f"http://{app.address}") as http,
    ):
        assert (await http.get("/health")).status_code == 503
        assert await health_of(app) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await http.post("/v1/completions", json=PROMPT)).status_code == 503

        async with serve_pair(app.control_address, "tiny", TOKEN):
            await wait_for_pair(http)
            await asyncio.sleep(0.15)
            assert await health_of(app) == health_pb2.HealthCheckResponse.SERVING
            body = (await http.post("/v1/completions", json=PROMPT)).json()
            assert body["usage"]["completion_tokens"] == 9
            scored = await http.post("/v1/completions", json=PROMPT | {"echo": True, "max_tokens": 0}, timeout=5)
            assert (scored.status_code, scored.json()["choices"][0]["text"]) == (200, "hello")
            async with open_channel(app.grpc_address) as channel:
                request = inference_pb2.GenerateRequest(model="tiny", text="hello")
                request.sampling.max_tokens = 9
                request.sampling.ignore_eos = True
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                answers = [answer async for answer in stub.Generate(request, timeout=10)]
            assert sum(len(answer.token_ids) for answer in answers) == 9
            page = (await http.get("/metrics")).text
            assert 'tandem_requests_total{outcome="length"} 3.0' in page
            assert 'tandem_instance_up{role="decode",tandem_instance="decode-1"} 1.0' in page
            async with open_channel(app.control_address, TOKEN) as channel:
                description = await describe_fleet(channel, 5.0)
            assert {status.instance_id for status in description.instances} == {"prefill-1", "decode-1"}

        await poll(lambda: http.get("/health"), lambda answer: answer.status_code == 503)


async def test_control_port_needs_the_token(checkpoint: Path) -> None:
    async with running_router(checkpoint) as app, open_channel(app.control_address, "wrong") as channel:
        with pytest.raises(Exception, match="cluster token"):
            await describe_fleet(channel, 5.0)


async def test_client_that_goes_away_frees_the_worker(checkpoint: Path) -> None:
    async with (
        running_router(checkpoint) as app,
        serve_pair(app.control_address, "tiny", TOKEN) as pair,
        httpx.AsyncClient(base_url=f"http://{app.address}") as http,
    ):
        await wait_for_pair(http)
        pair.prefill.is_silent = True
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/v1/completions", json=PROMPT, timeout=0.2)
        await until(lambda: len(pair.prefill.cancelled) == 1)


async def test_drain_lets_running_requests_end(checkpoint: Path) -> None:
    async with (
        running_router(checkpoint) as app,
        serve_pair(app.control_address, "tiny", TOKEN) as pair,
        httpx.AsyncClient(base_url=f"http://{app.address}") as http,
    ):
        await wait_for_pair(http)
        pair.prefill.is_silent = True
        waiting = asyncio.create_task(http.post("/v1/completions", json=PROMPT, timeout=10))
        async with open_channel(app.control_address, TOKEN) as channel:
            await poll(lambda: describe_fleet(channel, 5.0), lambda described: described.queued_requests == 1)
        draining = asyncio.create_task(app.drain_and_stop(0.3))
        await asyncio.sleep(0.15)
        assert (await http.post("/v1/completions", json=PROMPT)).status_code == 503
        assert (await http.get("/health")).status_code == 503
        assert await health_of(app) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await waiting).status_code == 503, "its grace is over"
        await draining
        await app.wait_closed()


def _break_the_timer(app: RouterApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def advance(now_s: float) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(app._dispatcher.machine, "advance", advance)
    app._dispatcher.wake_at(0.0)


def _break_the_http_server(app: RouterApp, monkeypatch: pytest.MonkeyPatch) -> None:
    async def on_tick(server: uvicorn.Server, counter: int) -> bool:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(uvicorn.Server, "on_tick", on_tick)


def _break_the_fleet(app: RouterApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def drop_silent() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(app._dispatcher.fleet, "_drop_silent", drop_silent)


@pytest.mark.parametrize("break_it", [_break_the_timer, _break_the_http_server, _break_the_fleet])
async def test_a_task_that_fails_is_the_end_of_the_router(
    break_it: Callable[[RouterApp, pytest.MonkeyPatch], None],
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running_router(checkpoint) as app:
        break_it(app, monkeypatch)
        with pytest.raises((ZeroDivisionError, ExceptionGroup)):
            async with asyncio.timeout(5):
                await app.wait_closed()
        assert "has ended" in caplog.text


async def test_a_task_that_just_ends_is_the_end_of_the_router_too(checkpoint: Path) -> None:
    async with running_router(checkpoint) as app:
        app._background[0].cancel()
        with pytest.raises(InternalError, match="'fleet'"):
            async with asyncio.timeout(5):
                await app.wait_closed()


async def test_address_in_use_is_one_sentence_and_leaves_nothing_open(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name in ("http", "grpc", "control"):
            app = RouterApp(make_config(checkpoint, **{name: f"127.0.0.1:{port}"}))
            with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
                await app.start()
            if app.control_address:
                async with open_channel(app.control_address, TOKEN) as channel:
                    with pytest.raises(grpc.aio.AioRpcError):
                        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1)


async def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        await RouterApp(make_config(tmp_path)).start()


# --- as a process ----------------------------------------------------------------------------------------------------


def write_config(folder: Path, model: Path, http: str = ANY_PORT) -> Path:
    path = folder / "router.yaml"
    path.write_text(
        f"model: {model}\nrouter:\n  http: '{http}'\n  grpc: '{ANY_PORT}'\n  control: '{ANY_PORT}'\n"
        f"model_name: tiny\ncluster_token: {TOKEN}\n"
    )
    return path


async def start_process(config: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tandem.router", "--config", str(config), "--grace", "30"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def read_addresses(process: asyncio.subprocess.Process) -> dict[str, str]:
    assert process.stdout is not None
    lines = [(await process.stdout.readline()).decode().split() for _ in range(3)]
    return dict(lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_idle_process_ends_cleanly(tmp_path: Path, checkpoint: Path, number: signal.Signals) -> None:
    process = await start_process(write_config(tmp_path, checkpoint))
    async with asyncio.timeout(30):
        addresses = await read_addresses(process)
        assert set(addresses) == {"HTTP", "gRPC", "control"}
        process.send_signal(number)
        _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert b"Traceback" not in errors


async def test_second_signal_ends_running_requests(tmp_path: Path, checkpoint: Path) -> None:
    process = await start_process(write_config(tmp_path, checkpoint))
    async with asyncio.timeout(30):
        addresses = await read_addresses(process)
        async with (
            serve_pair(addresses["control"], "tiny", TOKEN) as pair,
            httpx.AsyncClient(base_url=addresses["HTTP"]) as http,
        ):
            await wait_for_pair(http)
            pair.prefill.is_silent = True
            waiting = asyncio.create_task(http.post("/v1/completions", json=PROMPT, timeout=20))
            await asyncio.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            assert not waiting.done()
            process.send_signal(signal.SIGTERM)
            assert (await waiting).status_code == 503
            _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert b"Traceback" not in errors


async def test_port_in_use_exits_with_one_sentence(tmp_path: Path, checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = await start_process(write_config(tmp_path, checkpoint, http=address))
        async with asyncio.timeout(30):
            out, errors = await process.communicate()
    assert process.returncode == 1
    assert out == b""
    assert b"Traceback" not in errors
    assert errors.decode().strip().splitlines()[-1].startswith(f"cannot listen on {address}")
