"""Ports, and the end of the server."""

import asyncio
import socket

import httpx
import pytest
from tokenizers import Tokenizer

from tandem.core.errors import ConfigError
from tandem.core.router_section import RouterSection
from tandem.router.http_server import HttpServer
from tandem.router.tokenizer import TextTokenizer
from tests.router.front import MODEL, serve_front


async def never(scope: object, receive: object, send: object) -> None:
    raise AssertionError("nobody asks")


async def test_a_taken_port_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot listen on {address}"):
            await HttpServer(never, RouterSection(http=address)).start()


async def test_stop_cuts_off_what_does_not_end(tokenizer: TextTokenizer, raw_tokenizer: Tokenizer) -> None:
    async with serve_front(tokenizer, raw_tokenizer) as front:
        front.generator.delay_s = 0.05
        front.generator.max_model_len_or_none = 100_000
        client = front.client()
        body = {"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 99_000}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            assert len(front.generator.running) == 1
            stopped = asyncio.create_task(front.server.stop())
            with pytest.raises(httpx.HTTPError):
                async for _ in lines:
                    pass
            await asyncio.wait_for(stopped, 5)
        await client.aclose()
        assert not front.generator.running
        with pytest.raises(httpx.ConnectError):
            async with front.client() as late:
                await late.get("/health")
