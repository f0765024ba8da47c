"""API keys: who gets in, over HTTP and gRPC, and what each key may ask for."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from tandem import AsyncClient
from tandem.core.api_keys import ApiKey, digest_of, new_key
from tandem.core.clock import ManualClock, SystemClock
from tandem.core.errors import (
    ConfigError,
    OverloadedError,
    PermissionDeniedError,
    TandemError,
    UnauthenticatedError,
)
from tandem.core.router_section import RouterSection
from tandem.core.timeline import Stage, Timeline
from tandem.router.api_keys import KEY_RATE, KEY_REQUESTS, ApiKeyAccess, KeyRateLimit, load_keys
from tandem.router.records import RequestRecord
from tandem.router.tenant_metrics import TenantMetrics
from tandem.router.tokenizer import TextTokenizer
from tandem.v1 import inference_pb2, inference_pb2_grpc
from tandem.wire.inference import InferenceServicer
from tandem.wire.server import bind, build_public_server
from tests.router.front import MODEL, Front, serve_front

ALICE, BOB, OLD, GATEWAY = (new_key() for _ in range(4))
HASH = f"'{'0' * 64}'"
NOW = datetime.now(UTC)
KEYS = (
    ApiKey(name="alice-1", tenant="alice", sha256=digest_of(ALICE), max_requests=1),
    ApiKey(name="bob", tenant="bob", sha256=digest_of(BOB), requests_per_s=0.01, burst=2),
    ApiKey(name="old", tenant="alice", sha256=digest_of(OLD), expires=NOW - timedelta(seconds=1)),
    ApiKey(name="gateway", tenant="gateway", sha256=digest_of(GATEWAY), names_tenants=True),
)
BODY = {"model": MODEL, "prompt": "abc", "max_tokens": 2}
WRONG = {
    "none": {},
    "empty": {"authorization": ""},
    "no scheme": {"authorization": ALICE},
    "another scheme": {"authorization": f"Basic {ALICE}"},
    "unknown": {"authorization": f"Bearer {new_key()}"},
    "its hash": {"authorization": f"Bearer {digest_of(ALICE)}"},
    "a part": {"authorization": f"Bearer {ALICE[:-1]}"},
    "expired": {"authorization": f"Bearer {OLD}"},
}


@dataclass
class Served:
    front: Front
    keys: ApiKeyAccess
    grpc_address: str

    def http(self, key: str) -> httpx.AsyncClient:
        return self.front.client(headers={"authorization": f"Bearer {key}"})


@asynccontextmanager
async def serving(tokenizer: TextTokenizer, raw_tokenizer: object) -> AsyncIterator[Served]:
    keys = ApiKeyAccess(KEYS, SystemClock())
    settings = RouterSection(api_keys="env:UNREAD")
    async with serve_front(tokenizer, raw_tokenizer, settings, keys) as front:  # type: ignore[arg-type]
        server, health = build_public_server(1 << 20, keys)
        servicer = InferenceServicer(front.service, SystemClock(), Random(2), 5.0, keys)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
        reflection.enable_server_reflection((reflection.SERVICE_NAME,), server)
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        address = bind(server, "127.0.0.1:0")
        await server.start()
        try:
            yield Served(front, keys, address)
        finally:
            await server.stop(0.1)


@pytest.fixture
async def served(tokenizer: TextTokenizer, raw_tokenizer: object) -> AsyncIterator[Served]:
    async with serving(tokenizer, raw_tokenizer) as served:
        yield served


async def test_without_a_valid_key_only_health_answers(served: Served) -> None:
    async with served.front.client() as client:
        for name, headers in WRONG.items():
            for method, path in (
                ("POST", "/v1/completions"),
                ("POST", "/v1/chat/completions"),
                ("GET", "/v1/models"),
                ("GET", f"/v1/models/{MODEL}"),
                ("GET", "/metrics"),
                ("GET", "/openapi.json"),
                ("GET", "/nothing"),
                ("OPTIONS", "/v1/models"),
            ):
                response = await client.request(method, path, headers=headers, json=BODY)
                assert response.status_code == 401, f"{name}: {path}"
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "unauthenticated"
        assert (await client.get("/health")).status_code == 200
        twice = [("authorization", f"Bearer {ALICE}")] * 2
        assert (await client.get("/v1/models", headers=twice)).status_code == 400
    assert not served.front.generator.requests
    async with served.http(ALICE) as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
        assert (await client.get("/metrics", headers={"authorization": f"bearer  {ALICE}"})).status_code == 200


async def test_without_a_valid_key_only_health_answers_over_grpc(served: Served) -> None:
    async with grpc.aio.insecure_channel(served.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for headers in WRONG.values():
            metadata = tuple(headers.items())
            for call in (
                _all(stub.Generate(inference_pb2.GenerateRequest(text="abc"), metadata=metadata)),
                stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata),
                _all(
                    reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(()), metadata=metadata)
                ),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        check = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert check.status == health_pb2.HealthCheckResponse.SERVING
    assert not served.front.generator.requests
    async with AsyncClient(served.grpc_address, api_key=ALICE) as client:
        assert (await client.models())[0].id == MODEL
        assert (await client.generate(prompt="abc", max_tokens=2)).usage.completion_tokens == 2
    async with AsyncClient(served.grpc_address) as client:
        with pytest.raises(UnauthenticatedError, match="needs an API key"):
            await client.generate(prompt="abc")


async def test_a_key_has_so_many_requests_at_once_over_both_apis(served: Served) -> None:
    served.front.say("x", then_eos=False)
    served.front.generator.delay_s = 0.1
    async with served.http(ALICE) as http, AsyncClient(served.grpc_address, api_key=ALICE) as client:
        async with client.stream(prompt="abc", max_tokens=400) as stream:
            await anext(stream)
            refused = await http.post("/v1/completions", json=BODY)
            assert refused.status_code == 429
            assert refused.headers["x-tandem-refused-because"] == KEY_REQUESTS
            with pytest.raises(OverloadedError, match="alice-1"):
                await client.generate(prompt="abc")
            assert (await http.get("/v1/models")).status_code == 200, "only completions count"
            async with AsyncClient(served.grpc_address, api_key=GATEWAY) as other:
                assert (await other.generate(prompt="abc", max_tokens=1)).text
        await served.front.wait_until_idle()
        async with asyncio.timeout(5.0):
            while (await http.post("/v1/completions", json=BODY)).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_a_key_that_sends_slowly_holds_one_request(served: Served) -> None:
    """The limit counts before the body is read: so a key's share of the memory for bodies is bounded."""
    reader, writer = await asyncio.open_connection(*served.front.url.removeprefix("http://").split(":"))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x.localhost\r\nauthorization: Bearer {ALICE}\r\n"
    writer.write(f"{head}content-type: application/json\r\ncontent-length: 100\r\n\r\n{{".encode())
    async with served.http(ALICE) as http, asyncio.timeout(10):
        while (await http.post("/v1/completions", json=BODY)).status_code != 429:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        writer.close()
        while (await http.post("/v1/completions", json=BODY)).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    del reader


async def test_a_key_has_a_rate(served: Served) -> None:
    async with served.http(BOB) as client:
        statuses = [(await client.post("/v1/completions", json=BODY)).status_code for _ in range(2)]
        refused = await client.post("/v1/completions", json=BODY)
    assert statuses == [200, 200]
    assert refused.status_code == 429
    assert refused.headers["x-tandem-refused-because"] == KEY_RATE
    assert 90 <= int(refused.headers["retry-after"]) <= 100
    assert served.keys.refusals()["bob", KEY_RATE] == 1


async def test_the_tenant_is_the_keys(served: Served) -> None:
    async def send(key: str, tenant: str = "") -> int:
        async with served.http(key) as client:
            headers = {"x-tandem-tenant": tenant} if tenant else {}
            return (await client.post("/v1/completions", json=BODY, headers=headers)).status_code

    assert [await send(ALICE), await send(ALICE, "alice"), await send(ALICE, "bob")] == [200, 200, 403]
    assert [await send(GATEWAY), await send(GATEWAY, "acme")] == [200, 200]
    generator = served.front.generator
    assert generator.clients == ["alice", "alice", "gateway", "acme"]
    assert len({request.cache_salt for request in generator.requests}) == 3, "tenants share no cached prefix"
    async with AsyncClient(served.grpc_address, api_key=ALICE) as client:
        with pytest.raises(PermissionDeniedError, match="may not name another"):
            await client.generate(prompt="abc", tenant="bob")
        await client.generate(prompt="abc", max_tokens=1, cache_salt="s")
    assert generator.clients[-1] == "alice"
    assert generator.requests[-1].cache_salt == "5:alices"


async def _all(call: Any) -> list[Any]:
    return [message async for message in call]


def _admit(keys: ApiKeyAccess, key: str) -> None:
    with keys.admit(keys.authenticate(f"Bearer {key}", "")):
        pass


def test_keys_change_and_counts_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = ApiKeyAccess(KEYS, ManualClock())
    _admit(keys, BOB)
    with keys.admit(keys.authenticate(f"Bearer {ALICE}", "")):
        keys.replace((KEYS[0], KEYS[1].model_copy(update={"tenant": "robert"})))
        with pytest.raises(OverloadedError):
            _admit(keys, ALICE)
    _admit(keys, ALICE)
    _admit(keys, BOB)
    with pytest.raises(OverloadedError):
        _admit(keys, BOB)
    with pytest.raises(UnauthenticatedError):
        _admit(keys, GATEWAY)
    assert keys.tenants == {"alice", "robert"}
    assert keys.authenticate(f"Bearer {BOB}", "").tenant == "robert"


async def test_a_file_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tandem.core.file_watch._LOOK_S", 0.01)
    caplog.set_level(logging.INFO)
    file = tmp_path / "keys.yaml"

    def write(*keys: str) -> None:
        entries = "".join(f"  - {{name: k{i}, tenant: t, sha256: {digest_of(key)}}}\n" for i, key in enumerate(keys))
        draft = file.with_suffix(".new")
        draft.write_text(f"keys:\n{entries}")
        draft.replace(file)

    def knows(key: str) -> bool:
        try:
            return bool(keys.authenticate(f"Bearer {key}", ""))
        except UnauthenticatedError:
            return False

    async def until(text: str) -> None:
        async with asyncio.timeout(10):
            while text not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        caplog.clear()

    write(ALICE)
    keys = ApiKeyAccess(load_keys(f"file:{file}"), SystemClock())
    watching = asyncio.create_task(keys.reload_when_changed(f"file:{file}"))
    await until("1 API keys of 1 tenants are in force")
    assert [knows(ALICE), knows(BOB)] == [True, False]
    write(BOB, GATEWAY)
    await until("2 API keys of 1 tenants are in force")
    assert [knows(ALICE), knows(BOB)] == [False, True]
    file.write_text("keys: nonsense\n")
    await until("the API keys stay as they were")
    assert knows(BOB)
    write(ALICE)
    await until("1 API keys")
    assert [knows(ALICE), knows(BOB)] == [True, False]
    watching.cancel()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "keys must have at least 1 item"),
        ("{name: a, tenant: t, sha256: my-secret-key}", "keys.0.sha256: string should match pattern"),
        ("{name: 'a b', tenant: t, sha256: HASH}", "keys.0.name: string should match"),
        ("{name: a, tenant: t, key: sk}", "keys.0.key is not a setting"),
        ("{name: a, tenant: t, sha256: HASH}, {name: b, tenant: t, sha256: HASH}", "keys.1.sha256: is that of keys.0"),
        ("{name: a, tenant: t, sha256: HASH, expires: 2027-01-01T00:00:00}", "keys.0.expires"),
    ],
)
def test_mistakes_in_keys(text: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", f"keys: [{text.replace('HASH', HASH)}]")
    with pytest.raises(ConfigError) as caught:
        load_keys("env:KEYS")
    assert sentence in caught.value.message
    assert "my-secret-key" not in caught.value.message, "whoever mistakes the key for its hash finds it in no log"


def test_keys_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for source in ("env:NO_SUCH_VARIABLE", f"file:{tmp_path / 'none.yaml'}"):
        with pytest.raises(ConfigError):
            load_keys(source)


def test_metrics_count_by_tenants_of_the_file_only() -> None:
    keys, registry = ApiKeyAccess(KEYS, ManualClock()), CollectorRegistry()
    metrics = TenantMetrics(keys, registry)
    for tenant in ("alice", "bob", "made-up", "10.0.0.1"):
        timeline = Timeline({Stage.RECEIVED: 0.0, Stage.FINISHED: 1.0}, num_prompt_tokens=5, num_output_tokens=3)
        metrics.finished(RequestRecord("r", "stop", None, timeline, (), tenant=tenant))
    metrics.refused(TandemError("no"))
    page = generate_latest(registry).decode()
    assert 'tandem_tenant_requests_total{outcome="stop",tenant="alice"} 1.0' in page
    assert 'tandem_tenant_requests_total{outcome="stop",tenant="other"} 2.0' in page
    assert 'tandem_tenant_prompt_tokens_total{tenant="bob"} 5.0' in page
    assert 'tandem_tenant_output_tokens_total{tenant="other"} 6.0' in page
    assert 'tandem_tenant_refusals_total{reason="key-rate",tenant="gateway"} 0.0' in page
    assert "made-up" not in page


@given(
    per_s=st.floats(0.01, 100.0),
    burst=st.integers(1, 20),
    pauses=st.lists(st.floats(0.0, 50.0), max_size=60),
    patient=st.booleans(),
)
def test_a_rate_limit(per_s: float, burst: int, pauses: list[float], patient: bool) -> None:
    """In any stretch of time, at most `burst` and the rate times its length; and whoever waits as told is let in."""
    limit, now_s, taken = KeyRateLimit(per_s, burst), 0.0, []
    for pause_s in pauses:
        now_s += pause_s
        wait_s = limit.wait_s(now_s)
        if wait_s > 0.0 and patient:
            now_s += wait_s * (1 + 1e-9) + 1e-9
            wait_s = limit.wait_s(now_s)
            assert wait_s == 0.0
        if wait_s == 0.0:
            taken.append(now_s)
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + (taken[last] - taken[first]) * per_s + 1e-6
