"""What clients may do to a connection: send garbage, send slowly, send too much, not read, go half away."""

import asyncio
import json
import random
import resource
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer

from tandem.core.router_section import RouterSection
from tandem.router.http_connection import NUM_RESERVED
from tandem.router.http_server import raise_descriptor_limit
from tandem.router.tokenizer import TextTokenizer
from tests.router.front import MODEL, Front, serve_front
from tests.router.raw_http import CHAT, RawResponse, connect, exchange, parse_responses, request_bytes

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGES = [{"role": "user", "content": "hi"}]
HEALTH = request_bytes(path="/health", method="GET")
KEPT_HEALTH = request_bytes(path="/health", method="GET", close=False)


async def wait_until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110 - seen from outside
            await asyncio.sleep(0.005)


async def check_health(front: Front) -> None:
    async with front.client() as client:
        assert (await client.get("/health")).status_code == 200


async def responses_to(front: Front, *parts: bytes, **options: Any) -> list[RawResponse]:
    return parse_responses(await exchange(front, *parts, **options))


# --- what is no HTTP --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/2.7\r\nhost: localhost\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost localhost\r\n\r\n",
        b"GET /health HTTP/1.1\nhost: localhost\nno colon\n\n",
        b"CONNECT localhost:1 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nhost: localhost\r\n\r\n",
        request_bytes(b"{}", content_length="-1"),
        request_bytes(b"{}", content_length="1" * 30),
        request_bytes(b"{}", content_length="2", Content_Length="3"),
        request_bytes(b"{}", transfer_encoding="chunked"),
        request_bytes(b"zz\r\n", content_length="", transfer_encoding="chunked"),
        request_bytes(b"1\r\n{}}\r\n", content_length="", transfer_encoding="chunked"),
        b"\x00" * 100,
    ],
)
async def test_garbage_gets_a_sentence(front: Front, data: bytes) -> None:
    response = (await responses_to(front, data))[-1]
    assert response.status == 400
    assert response.code == "invalid_request"
    assert b"Traceback" not in response.body
    assert response.headers["connection"] == "close"


async def test_upgrades_are_ignored(front: Front) -> None:
    """Java's client offers HTTP/2 with each first request."""
    front.say("yes")
    upgrade = request_bytes(
        {"messages": MESSAGES}, close=False, connection="Upgrade, HTTP2-Settings", upgrade="h2c", http2_settings="AAM"
    )
    assert [response.status for response in await responses_to(front, upgrade + HEALTH)] == [200, 200]


async def test_pipelined_requests_are_answered_in_order(front: Front) -> None:
    front.say("yes")
    chat = request_bytes({"messages": MESSAGES, "max_tokens": 20}, close=False)
    missing = request_bytes(path="/nothing", method="GET", close=False)
    responses = await responses_to(front, chat + missing + chat + KEPT_HEALTH + HEALTH)
    assert [response.status for response in responses] == [200, 404, 200, 200, 200]


async def test_garbage_after_a_request_harms_only_itself(front: Front) -> None:
    """The response that is on its way is not torn."""
    front.generator.delay_s = 0.01
    chat = request_bytes({"messages": MESSAGES, "max_tokens": 20, "stream": True}, close=False)
    for begins in (b"\x00\x01garbage\r\n\r\n", chat[:-10].replace(b"content-length", b"transfer-encoding")):
        ok, refused = await responses_to(front, chat, begins, pause_s=0.05)
        assert (ok.status, refused.status) == (200, 400)
        assert ok.body.endswith(b"data: [DONE]\n\n")


async def test_too_many_pipelined_requests(front: Front) -> None:
    front.generator.delay_s = 0.01
    chat = request_bytes({"messages": MESSAGES, "max_tokens": 20}, close=False)
    responses = await responses_to(front, chat + KEPT_HEALTH * 500)
    assert [response.status for response in responses] == [200] * 17 + [429]


async def test_a_second_request_after_close_is_not_served(front: Front) -> None:
    assert len(await responses_to(front, HEALTH + HEALTH)) == 1


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * (1 << 20),
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 200_000,
        b"GET /" + b"y" * (1 << 20),
        b"GET /health HTTP/1.1\r\n" + b"y" * (1 << 20),
        request_bytes(content_length="", transfer_encoding="chunked") + b"1;" + b"y" * (1 << 20),
        request_bytes(content_length="", transfer_encoding="chunked") + b"1\r\n{\r\n0\r\nx: " + b"y" * (1 << 20),
        request_bytes(content_length="", transfer_encoding="chunked") + b"0\r\n" + b"x: y\r\n" * 200_000,
    ],
    ids=["one header", "many headers", "path", "name", "chunk extension", "trailer", "trailers"],
)
async def test_large_heads_are_refused_while_they_come(front: Front, head: bytes) -> None:
    """None of them ends: the server must not wait for that."""
    assert [response.status for response in await responses_to(front, head)] in ([431], [400, 431])
    await check_health(front)


async def test_usual_heads_fit(front: Front) -> None:
    for size in (1000, 8000, 30_000):
        head = request_bytes(path="/health", method="GET", cookie="x" * size)
        for at in (0, 20, size - 50):  # cut anywhere
            assert [response.status for response in await responses_to(front, head[:at], head[at:])] == [200]


async def test_bodies_in_memory_are_bounded(tokenizer: TextTokenizer, raw_tokenizer: Tokenizer) -> None:
    """A body counts until its request has ended."""
    limited = serve_front(tokenizer, raw_tokenizer, RouterSection(max_body=3000, max_bodies=3000))
    async with limited as front, front.client() as client:
        front.generator.delay_s = 0.2
        text = {"model": MODEL, "prompt": "x " * 200, "max_tokens": 50}
        running = [asyncio.create_task(client.post("/v1/completions", json=text | {"seed": 7})) for _ in range(6)]
        await wait_until(lambda: len(front.generator.requests) == 6)
        refused = await client.post("/v1/completions", json=text | {"prompt": "x " * 400})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert "bodies" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] == "1"
        front.generator.delay_s = 0.0
        assert {(await task).status_code for task in running} == {200}
        assert (await client.post("/v1/completions", json=text)).status_code == 200
        refused = await client.post("/v1/completions", json=text | {"logprobs": 5})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert not front.generator.running, "its log-probabilities are part of the response's body"
        streamed = await client.post("/v1/completions", json=text | {"logprobs": 5, "stream": True})
        assert streamed.text.endswith("data: [DONE]\n\n"), "a stream keeps nothing"
        assert (await client.post("/v1/completions", json=text)).status_code == 200


WIDE_BODIES: list[tuple[bytes, str]] = [
    (b'{"messages":[' + b'{"role":"user","content":"x"},' * 30_000, "lists and objects"),
    (b'{"prompt":' + b"[" * 30_000, "lists and objects"),
    (b'{"a":1,' + b'"b":1,' * 80_000, "keys"),
    (b'{"prompt":[' + b"5," * 300_000, "items"),
]


@pytest.mark.parametrize(("body", "words"), WIDE_BODIES)
async def test_bodies_of_many_small_things_are_refused_before_they_are_parsed(
    front: Front, body: bytes, words: str
) -> None:
    """Also before they are whole."""
    (response,) = await responses_to(front, request_bytes(body, content_length=str(1 << 20), close=True))
    assert response.status == 400
    assert words in json.loads(response.body)["error"]["message"]


# --- time -------------------------------------------------------------------------------------------------------------


async def test_what_does_not_arrive_in_time(tokenizer: TextTokenizer, raw_tokenizer: Tokenizer) -> None:
    settings = RouterSection(header_timeout_s=0.3, body_timeout_s=0.3, idle_timeout_s=0.3)
    async with serve_front(tokenizer, raw_tokenizer, settings) as front:
        front.say("yes")
        chat = request_bytes({"messages": MESSAGES})
        drops = [bytes([byte]) for byte in chat]
        slow, silent, body, chunked, unread, idle, blank = await asyncio.gather(
            responses_to(front, *drops, pause_s=0.02),
            exchange(front),
            responses_to(front, chat[:-5]),
            responses_to(front, request_bytes(b"1\r\n{\r\n", content_length="", transfer_encoding="chunked")),
            responses_to(front, request_bytes(b"{}", path="/nothing", content_length="9", close=False)),
            responses_to(front, KEPT_HEALTH),
            responses_to(front, KEPT_HEALTH, *[b"\r\n"] * 10, pause_s=0.02),
        )
        for responses in (slow, body, chunked):
            assert [response.status for response in responses] == [408]
            assert responses[0].code == "request_timeout"
        assert silent == b""
        assert [response.status for response in unread] == [404]
        assert [response.status for response in idle + blank] == [200, 200]
        assert [response.status for response in await responses_to(front, chat[:50], chat[50:], pause_s=0.05)] == [200]
        await wait_until(lambda: not front.generator.running)


async def test_a_client_that_does_not_read_ends_its_own_request(
    tokenizer: TextTokenizer, raw_tokenizer: Tokenizer
) -> None:
    async with serve_front(tokenizer, raw_tokenizer, RouterSection(write_timeout_s=0.5)) as front:
        front.generator.max_model_len_or_none = 1_000_000
        front.generator.tokens_per_step = 100
        stream = {"messages": MESSAGES, "stream": True, "logprobs": True, "top_logprobs": 5, "max_tokens": 80_000}
        _, unread = await connect(front)
        unread.write(request_bytes(stream))
        await wait_until(lambda: bool(front.generator.running))
        await check_health(front)
        await wait_until(lambda: not front.generator.running)
        assert front.generator.generations[0].was_cut_short
        unread.close()


async def test_half_closed_clients_get_their_responses(front: Front) -> None:
    front.generator.delay_s = 0.02
    for changes in ({}, {"stream": True}, {"n": 3}):
        chat = request_bytes({"messages": MESSAGES, "max_tokens": 20} | changes, close=False)
        (response,) = await responses_to(front, chat, half_close=True)
        assert response.status == 200
        assert b'"finish_reason":"length"' in response.body
    responses = await responses_to(front, chat + KEPT_HEALTH + KEPT_HEALTH, half_close=True)
    assert [response.status for response in responses] == [200, 200, 200]
    assert await exchange(front, chat[:-1], half_close=True) == b"", "an unfinished request has no response"
    assert not front.generator.running


# --- number -----------------------------------------------------------------------------------------------------------


async def test_health_is_answered_when_all_connections_are_in_use(
    tokenizer: TextTokenizer, raw_tokenizer: Tokenizer
) -> None:
    async with serve_front(tokenizer, raw_tokenizer, RouterSection(max_connections=20)) as front:
        front.say("yes")
        held = [await connect(front) for _ in range(20)]
        chat = request_bytes({"messages": MESSAGES}, close=False)
        (refused,) = await responses_to(front, chat)
        assert (refused.status, refused.code) == (503, "unavailable")
        assert "All 20 connections are in use" in refused.body.decode()
        assert refused.headers["retry-after"] == "1"
        for path in ("/health", "/readyz", "/livez", "/metrics"):
            (response,) = await responses_to(front, request_bytes(path=path, method="GET", close=False))
            assert (response.status, response.headers["connection"]) == (200, "close")
        flood = [await connect(front) for _ in range(NUM_RESERVED)]
        (refused,) = await responses_to(front)
        assert refused.status == 503
        await asyncio.wait_for(asyncio.gather(*(reader.read() for reader, _ in flood)), 5)  # none stays for long
        await check_health(front)
        for _, writer in held[:5]:
            writer.close()
        await asyncio.sleep(0.05)
        assert [response.status for response in await responses_to(front, chat, half_close=True)] == [200]
        for _, writer in held + flood:
            writer.close()


async def test_a_client_has_so_many_connections(tokenizer: TextTokenizer, raw_tokenizer: Tokenizer) -> None:
    async with serve_front(tokenizer, raw_tokenizer, RouterSection(max_client_connections=3)) as front:
        held = [await connect(front) for _ in range(3)]
        (refused,) = await responses_to(front)
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert "3 connections of one client" in refused.body.decode()
        other = socket.socket()
        other.bind(("127.0.0.2", 0))
        other.setblocking(False)
        host, port = front.url.removeprefix("http://").split(":")
        await asyncio.get_running_loop().sock_connect(other, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=other)
        writer.write(request_bytes(path="/health", method="GET"))
        assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 200 ")
        writer.close()
        held.pop()[1].close()
        await asyncio.sleep(0.05)
        await check_health(front)
        for _, each in held:
            each.close()


async def test_the_descriptor_limit_is_raised() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 500), hard))
        assert raise_descriptor_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_one_client_cannot_run_everything(tokenizer: TextTokenizer, raw_tokenizer: Tokenizer) -> None:
    limited = serve_front(tokenizer, raw_tokenizer, RouterSection(max_client_choices=8))
    async with limited as front, front.client() as client:
        front.generator.delay_s = 0.2
        body = {"model": MODEL, "messages": MESSAGES, "n": 4, "max_tokens": 30}
        running = [asyncio.create_task(client.post(CHAT, json=body)) for _ in range(2)]
        await wait_until(lambda: len(front.generator.running) == 8)
        refused = await client.post(CHAT, json=body | {"n": 1})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert [error.code for error in front.refusals.errors] == ["overloaded"]
        running[0].cancel()
        await wait_until(lambda: len(front.generator.running) == 4)
        front.generator.delay_s = 0.0
        assert (await client.post(CHAT, json=body)).status_code == 200
        assert (await running[1]).status_code == 200
        assert (await client.post(CHAT, json=body | {"n": 9})).status_code == 429


# --- hosts and web pages ----------------------------------------------------------------------------------------------


async def test_only_own_names_on_loopback(tokenizer: TextTokenizer, raw_tokenizer: Tokenizer) -> None:
    """A page that gave its name the address 127.0.0.1 is refused."""

    async def status(front: Front, host: str) -> int:
        return (await responses_to(front, request_bytes(path="/health", method="GET", host=host)))[0].status

    async with serve_front(tokenizer, raw_tokenizer, RouterSection(allowed_hosts=("Proxy.example",))) as front:
        for host in ("localhost", "LOCALHOST:80", "app.localhost", "127.0.0.1:8000", "[::1]:8000", "proxy.example:1"):
            assert await status(front, host) == 200, host
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[x]", "x" * 5000):
            assert await status(front, host) == 403, host
        (twice,) = await responses_to(front, request_bytes(path="/health", method="GET", Host="evil.example"))
        assert twice.status == 400
        (without,) = await responses_to(front, b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n")
        assert (without.status, without.code) == (400, "invalid_request")
        (old,) = await responses_to(front, b"GET /health HTTP/1.0\r\n\r\n")
        assert old.status == 200


async def test_web_pages_need_permission(front: Front, tokenizer: TextTokenizer, raw_tokenizer: Tokenizer) -> None:
    page = "https://chat.example.com"
    preflight = {
        "origin": page,
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type, authorization",
    }
    async with front.client() as client:
        response = await client.options(CHAT, headers=preflight)
        assert (response.status_code, response.headers["allow"]) == (204, "POST, OPTIONS")
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert (await client.options("/health")).headers["allow"] == "GET, HEAD, OPTIONS"
    async with serve_front(tokenizer, raw_tokenizer, RouterSection(cors_origins=(page,))) as open_front:
        open_front.say("yes")
        async with open_front.client() as client:
            response = await client.options(CHAT, headers=preflight)
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == page
            assert "content-type" in response.headers["access-control-allow-headers"]
            for body in ({"messages": MESSAGES}, {"messages": MESSAGES, "stream": True}, {}):
                response = await client.post(CHAT, json={"model": MODEL} | body, headers={"origin": page})
                assert response.headers["access-control-allow-origin"] == page
            response = await client.options(CHAT, headers=preflight | {"origin": "https://evil.example"})
            assert "access-control-allow-origin" not in response.headers


# --- anything ---------------------------------------------------------------------------------------------------------


def mutate(random: random.Random, data: bytes) -> bytes:
    """Cut, double, swap and change some bytes."""
    mutated = bytearray(data)
    for _ in range(random.randint(0, 4)):
        start = random.randrange(len(mutated) + 1)
        end = min(len(mutated), start + random.randint(0, 12))
        match random.randrange(5):
            case 0:
                del mutated[start:end]
            case 1:
                mutated[start:start] = mutated[start:end]
            case 2:
                mutated[start:end] = random.randbytes(random.randint(0, 8))
            case 3:
                mutated[start:start] = random.choice(
                    [b"\r\n", b"\r\n\r\n", b"\x00", b": ", b"0", b"\xff", b'"', b"[" * 50]
                )
            case _:
                return bytes(mutated[:start])
    return bytes(mutated)


SEEDS = [
    request_bytes({"messages": MESSAGES, "max_tokens": 3}),
    request_bytes({"messages": MESSAGES, "max_tokens": 3, "stream": True}),
    request_bytes({"prompt": "x", "max_tokens": 3, "logprobs": 2, "echo": True}, path="/v1/completions", close=False),
    request_bytes(b"5\r\n{\"a\":\r\n2\r\n1}\r\n0\r\n\r\n", content_length="", transfer_encoding="chunked"),
    request_bytes(path="/v1/models/tiny", method="GET", close=False) + HEALTH,
    request_bytes({"messages": MESSAGES, "max_tokens": 3}, expect="100-continue"),
    request_bytes(path="/metrics", method="HEAD", upgrade="websocket", connection="upgrade"),
]  # fmt: skip
STATUSES = {200, 204, 400, 403, 404, 405, 408, 411, 413, 415, 429, 431}


async def check_random_bytes(front: Front, count: int, seed: int) -> None:
    """Every response is whole and of a declared status; nothing is left behind. Ten connections at a time."""
    source = random.Random(seed)

    async def check_one(data: bytes) -> None:
        answer = await exchange(front, data, half_close=True)
        answer = answer.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
        assert b"Traceback" not in answer
        if b"HEAD" in data.upper():  # its responses say a length and have no body
            assert not answer or answer.startswith(b"HTTP/1.1 ")
            return
        for response in parse_responses(answer):
            assert response.status in STATUSES, (data, answer)
            if response.status >= 400:
                assert set(json.loads(response.body)["error"]) == {"message", "type", "param", "code"}

    for start in range(0, count, 10):
        batch = [mutate(source, source.choice(SEEDS)) for _ in range(min(10, count - start))]
        await asyncio.gather(*map(check_one, batch))
    await front.wait_until_idle()
    await check_health(front)


async def test_random_bytes_never_break_it(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    await check_random_bytes(front, 200, seed=1)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_many_random_bytes_never_break_it(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    await check_random_bytes(front, 20_000, seed=int(time.time()))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
