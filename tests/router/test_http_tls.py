"""HTTP with TLS: certificates of both sides, their renewal, and the limits of connections."""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tandem.core.errors import ConfigError
from tandem.core.router_section import RouterSection
from tandem.router.tokenizer import TextTokenizer
from tandem.wire.server_tls import ServerTls
from tests.certificates import Authority, Certificate
from tests.router.front import MODEL, Front, serve_front

BODY = {"model": MODEL, "prompt": "abc", "max_tokens": 3}
REFUSED = (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError, httpx.CloseError)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


@pytest.fixture
def other_authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "other")


def trusting(ca: Path, own: Certificate | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    if own is not None:
        context.load_cert_chain(own.certificate, own.key)
    return context


@contextlib.asynccontextmanager
async def serving(
    tokenizer: TextTokenizer, raw_tokenizer: object, tls: ServerTls, **settings: object
) -> AsyncIterator[Front]:
    tls.load()
    section = RouterSection(**{"header_timeout_s": 1.0, **settings})  # type: ignore[arg-type]
    async with serve_front(tokenizer, raw_tokenizer, section, tls=tls) as front:  # type: ignore[arg-type]
        yield front


async def ask(front: Front, context: ssl.SSLContext) -> int:
    """A completion; its status."""
    async with httpx.AsyncClient(base_url=front.url, verify=context, timeout=20) as client:
        return (await client.post("/v1/completions", json=BODY)).status_code


async def test_streams_and_errors_over_tls(
    tokenizer: TextTokenizer, raw_tokenizer: object, authority: Authority
) -> None:
    files = authority.issue("server")
    async with serving(tokenizer, raw_tokenizer, ServerTls(files.certificate, files.key, None)) as front:
        assert front.url.startswith("https://")
        context = trusting(authority.ca)
        async with httpx.AsyncClient(base_url=front.url, verify=context, timeout=20) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=BODY) for _ in range(5)))
            assert [answer.status_code for answer in answers] == [200] * 5
            async with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as stream:
                assert [line async for line in stream.aiter_lines()][-2] == "data: [DONE]"
            json_type = {"content-type": "application/json"}
            large = await client.post("/v1/completions", content=b"x" * (9 << 20), headers=json_type)
            assert large.status_code == 413
            wrong = await client.get("/v1/models", headers={"x": "y" * 60_000})
            assert wrong.status_code == 431
            front.say("x", then_eos=False)
            with contextlib.suppress(httpx.ReadTimeout):
                await client.post("/v1/completions", json=BODY | {"max_tokens": 400}, timeout=0.2)
        await front.wait_until_idle()


async def test_whom_a_server_and_a_client_trust(
    tokenizer: TextTokenizer, raw_tokenizer: object, authority: Authority, other_authority: Authority
) -> None:
    files = authority.issue("server")
    async with serving(tokenizer, raw_tokenizer, ServerTls(files.certificate, files.key, authority.ca)) as front:
        assert await ask(front, trusting(authority.ca, authority.issue("client"))) == 200
        for own in (None, other_authority.issue("foreign"), authority.issue("expired", is_expired=True)):
            with pytest.raises(REFUSED):
                await ask(front, trusting(authority.ca, own))
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            await ask(front, trusting(other_authority.ca, authority.issue("client")))
        with pytest.raises(REFUSED):
            async with httpx.AsyncClient(base_url=front.url.replace("https", "http")) as client:
                await client.get("/health")
        old = trusting(authority.ca, authority.issue("client"))
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert await ask(front, old) == 200
    assert not front.generator.running


async def test_a_certificate_is_renewed_without_a_pause(
    tokenizer: TextTokenizer,
    raw_tokenizer: object,
    authority: Authority,
    other_authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("tandem.core.file_watch._LOOK_S", 0.01)
    files = authority.issue("server")
    tls = ServerTls(files.certificate, files.key, None)
    async with serving(tokenizer, raw_tokenizer, tls) as front:
        reloading = asyncio.create_task(tls.reload_when_changed())
        await asyncio.sleep(0.05)
        async with httpx.AsyncClient(base_url=front.url, verify=trusting(authority.ca), timeout=20) as client:
            await client.get("/v1/models")
            files.key.write_text("not a key")
            async with asyncio.timeout(10):
                while "the certificate stays as it was" not in caplog.text:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert await ask(front, trusting(authority.ca)) == 200, "what cannot be used changes nothing"
            other_authority.issue("server")
            async with asyncio.timeout(10):
                while True:
                    with contextlib.suppress(httpx.ConnectError):
                        assert await ask(front, trusting(other_authority.ca)) == 200
                        break
                    await asyncio.sleep(0.01)
            assert (await client.get("/v1/models")).status_code == 200, "open connections stay"
        reloading.cancel()


async def test_handshakes_are_bounded_in_time_and_number(
    tokenizer: TextTokenizer, raw_tokenizer: object, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.router.tls_listener._MAX_HANDSHAKES", 4)
    files = authority.issue("server")
    tls = ServerTls(files.certificate, files.key, None)
    async with serving(tokenizer, raw_tokenizer, tls, header_timeout_s=60.0) as front:
        address = front.url.removeprefix("https://").split(":")
        silent = [await asyncio.open_connection(*address) for _ in range(9)]
        assert await ask(front, trusting(authority.ca)) == 200
        async with asyncio.timeout(10):
            for reader, _ in silent[:5]:  # cut off for later ones, though their time is not over
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
        for _, writer in silent:
            writer.close()
    async with serving(tokenizer, raw_tokenizer, tls, header_timeout_s=0.2) as front:
        reader, writer = await asyncio.open_connection(*front.url.removeprefix("https://").split(":"))
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()


async def test_a_client_that_does_not_read_is_cut_off_over_tls_too(
    tokenizer: TextTokenizer, raw_tokenizer: object, authority: Authority
) -> None:
    files = authority.issue("server")
    tls = ServerTls(files.certificate, files.key, None)
    async with serving(tokenizer, raw_tokenizer, tls, write_timeout_s=0.5) as front:
        front.generator.max_model_len_or_none = 1_000_000
        front.generator.tokens_per_step = 100
        body = json.dumps(BODY | {"stream": True, "logprobs": 5, "max_tokens": 80_000}).encode()
        _, unread = await asyncio.open_connection(
            *front.url.removeprefix("https://").split(":"), ssl=trusting(authority.ca)
        )
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
        unread.write(f"{head}content-type: application/json\r\n\r\n".encode() + body)
        async with asyncio.timeout(20):
            while not front.generator.generations or front.generator.running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert front.generator.generations[0].was_cut_short
        assert await ask(front, trusting(authority.ca)) == 200
        unread.close()


async def test_headers_have_a_time_over_tls_too(
    tokenizer: TextTokenizer, raw_tokenizer: object, authority: Authority
) -> None:
    files = authority.issue("server")
    tls = ServerTls(files.certificate, files.key, None)
    async with serving(tokenizer, raw_tokenizer, tls, header_timeout_s=0.3) as front:
        reader, writer = await asyncio.open_connection(
            *front.url.removeprefix("https://").split(":"), ssl=trusting(authority.ca)
        )
        writer.write(b"GET /health HTTP/1.1\r\n")
        async with asyncio.timeout(10):
            assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        writer.close()


@pytest.mark.parametrize("wrong", ["no file", "another key", "not PEM", "no authority"])
def test_files_that_cannot_be_used(wrong: str, authority: Authority, tmp_path: Path) -> None:
    files, other = authority.issue("server"), authority.issue("other")
    certificate, key, ca = files.certificate, files.key, authority.ca
    if wrong == "no file":
        certificate = tmp_path / "none.crt"
    elif wrong == "another key":
        key = other.key
    elif wrong == "not PEM":
        certificate.write_text("nothing")
    else:
        ca = tmp_path / "empty.pem"
        ca.write_text("")
    with pytest.raises(ConfigError, match="the files of TLS cannot be used"):
        ServerTls(certificate, key, ca).load()
