"""Clients with little overhead of their own: many streams at once, over HTTP and over gRPC."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import grpc

from tandem.core.address import split_address
from tandem.profiling.cluster import MODEL_NAME, StartedRouter
from tandem.profiling.errors import MeasurementError
from tandem.v1 import common_pb2, inference_pb2
from tandem.wire.channels import open_channel

_GENERATE = "/tandem.v1.InferenceService/Generate"


class Api(Enum):
    HTTP = "HTTP SSE"
    GRPC = "gRPC"


@dataclass(frozen=True, slots=True)
class StreamTimes:
    """Of one completion, on this process's monotonic clock."""

    sent_s: float
    first_s: float
    last_s: float


class StreamingClient(Protocol):
    async def complete(self, prompt: str, max_tokens: int) -> StreamTimes:
        """Streams one completion of exactly `max_tokens`. Raises MeasurementError if it is anything else."""
        ...


class _HttpClient:
    """One kept connection; the events of the response are not parsed."""

    def __init__(self, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._address = address
        self._reader = reader
        self._writer = writer

    async def complete(self, prompt: str, max_tokens: int) -> StreamTimes:
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
        response = b"".join(pieces)
        if f'"completion_tokens":{max_tokens},'.encode() not in response:
            raise MeasurementError(f"the router answered {(status + response)[:400].decode(errors='replace')}")
        return StreamTimes(sent_s, first_s, last_s)


class _GrpcClient:
    """Messages stay bytes, except the last one, which has the usage."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._generate: Any = channel.unary_stream(
            _GENERATE, request_serializer=inference_pb2.GenerateRequest.SerializeToString, response_deserializer=None
        )

    async def complete(self, prompt: str, max_tokens: int) -> StreamTimes:
        sampling = common_pb2.SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = inference_pb2.GenerateRequest(model=MODEL_NAME, text=prompt, sampling=sampling)
        sent_s = time.monotonic()
        first_s, last = 0.0, b""
        try:
            async for message in self._generate(request):
                first_s = first_s or time.monotonic()
                last = message
        except grpc.aio.AioRpcError as error:
            raise MeasurementError(f"the router answered {error.details()}") from error
        last_s = time.monotonic()
        num_tokens = inference_pb2.GenerateResponse.FromString(last).usage.completion_tokens
        if num_tokens != max_tokens:
            raise MeasurementError(f"the completion has {num_tokens} tokens instead of {max_tokens}")
        return StreamTimes(sent_s, first_s, last_s)


@asynccontextmanager
async def connect(router: StartedRouter, api: Api, num_clients: int) -> AsyncIterator[Sequence[StreamingClient]]:
    """Clients for concurrent requests: with a connection each over HTTP, all on one connection over gRPC."""
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


async def complete_all(
    clients: Sequence[StreamingClient], max_tokens: int, *, rounds: int = 1, label: str = ""
) -> list[StreamTimes]:
    """Every client sends `rounds` requests, one after another, each with another prompt, which contains `label`."""

    async def complete_in_turn(index: int, client: StreamingClient) -> list[StreamTimes]:
        return [await client.complete(f"{label}-{index}-{i}: def read_json(path):", max_tokens) for i in range(rounds)]

    times = await asyncio.gather(*(complete_in_turn(index, client) for index, client in enumerate(clients)))
    return [each for row in times for each in row]
