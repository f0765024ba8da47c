"""Clients that cost little beside what they measure: many streams at once, over HTTP and over gRPC."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import grpc

from bench.processes import MODEL_NAME, BenchError, Router
from tandem.core.config import split_address
from tandem.v1 import common_pb2, inference_pb2
from tandem.wire.channels import open_channel

_GENERATE = "/tandem.v1.InferenceService/Generate"


class Api(Enum):
    HTTP = "HTTP SSE"
    GRPC = "gRPC"


@dataclass(frozen=True, slots=True)
class Answer:
    """Times are on this process's monotonic clock. `num_pieces` counts the messages or events that held text."""

    sent_s: float
    first_s: float
    last_s: float
    num_pieces: int


class Client(Protocol):
    async def ask(self, prompt: str, max_tokens: int) -> Answer:
        """Streams one answer of exactly `max_tokens`. Raises BenchError if it is anything else."""
        ...


class _HttpClient:
    """One kept connection, read without looking at more than the events' borders."""

    def __init__(self, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._address = address
        self._reader = reader
        self._writer = writer

    async def ask(self, prompt: str, max_tokens: int) -> Answer:
        body = json.dumps(
            {
                "model": MODEL_NAME,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {self._address}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        sent_s = time.monotonic()
        self._writer.write(head.encode() + body)
        status = await self._reader.readuntil(b"\r\n\r\n")
        pieces = [await self._reader.read(1 << 16)]
        first_s = time.monotonic()
        while not pieces[-1].endswith(b"0\r\n\r\n"):
            pieces.append(await self._reader.read(1 << 16))
            if not pieces[-1]:
                break
        last_s = time.monotonic()
        answer = b"".join(pieces)
        if f'"completion_tokens":{max_tokens},'.encode() not in answer:
            raise BenchError(f"the router answered {(status + answer)[:400].decode(errors='replace')}")
        return Answer(sent_s, first_s, last_s, answer.count(b'"text":'))


class _GrpcClient:
    """Answers stay bytes but for the last message, which has the usage."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._generate: Any = channel.unary_stream(
            _GENERATE, request_serializer=inference_pb2.GenerateRequest.SerializeToString, response_deserializer=None
        )

    async def ask(self, prompt: str, max_tokens: int) -> Answer:
        sampling = common_pb2.SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = inference_pb2.GenerateRequest(model=MODEL_NAME, text=prompt, sampling=sampling)
        sent_s = time.monotonic()
        num_pieces, first_s, last = 0, 0.0, b""
        try:
            async for message in self._generate(request):
                first_s = first_s or time.monotonic()
                num_pieces += 1
                last = message
        except grpc.aio.AioRpcError as error:
            raise BenchError(f"the router answered {error.details()}") from error
        last_s = time.monotonic()
        num_tokens = inference_pb2.GenerateResponse.FromString(last).usage.completion_tokens
        if num_tokens != max_tokens:
            raise BenchError(f"the answer has {num_tokens} tokens instead of {max_tokens}")
        return Answer(sent_s, first_s, last_s, num_pieces - 1)


@asynccontextmanager
async def connect(router: Router, api: Api, num_clients: int) -> AsyncIterator[Sequence[Client]]:
    """Clients that may ask at the same time: a connection each over HTTP, all on one over gRPC, as is usual."""
    if api is Api.GRPC:
        async with open_channel(router.grpc) as channel:
            yield [_GrpcClient(channel) for _ in range(num_clients)]
        return
    connections = [await asyncio.open_connection(*split_address(router.http)) for _ in range(num_clients)]
    try:
        yield [_HttpClient(router.http, reader, writer) for reader, writer in connections]
    finally:
        for _, writer in connections:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in connections))


async def ask_all(clients: Sequence[Client], max_tokens: int, *, rounds: int = 1, label: str = "") -> list[Answer]:
    """Every client asks `rounds` times, one after the other, each time with another prompt; `label` makes them new."""

    async def ask_in_turn(index: int, client: Client) -> list[Answer]:
        return [await client.ask(f"{label}-{index}-{i}: def read_json(path):", max_tokens) for i in range(rounds)]

    answers = await asyncio.gather(*(ask_in_turn(index, client) for index, client in enumerate(clients)))
    return [answer for row in answers for answer in row]
