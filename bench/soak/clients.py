"""Sends one request of a soak and says what became of it. Every request ends here, if only because its time is over."""

import asyncio
import json
import math
import time
from dataclasses import dataclass

import httpx

from bench.soak.requests import Behaviour, SoakRequest, Way
from tandem.client import AsyncClient
from tandem.completion import GenerateOptions
from tandem.core.errors import TandemError

TIMEOUT_S = 60.0  # the deadline of each request
GRACE_S = 10.0  # beyond the deadline; what has no end by then is unanswered
SLOW_READ_S = 0.05

COMPLETE, CANCELLED, REFUSED, CUT, UNANSWERED, WRONG = (
    "complete",
    "cancelled by its client",
    "refused as a bad request",
    "connection lost",
    "unanswered",
    "not as the API says",
)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a request ended: one of the outcomes above, or the code of an error. `answers`, of each choice in order: its
    token ids over gRPC, its text over HTTP; None unless it is complete."""

    request: SoakRequest
    outcome: str
    took_s: float
    answers: tuple[tuple[int, ...] | str, ...] | None = None
    detail: str = ""


class _WrongAnswerError(Exception):
    """The answer has another form than was asked for."""


class Clients:
    """Both APIs of one router. Make it inside the running event loop."""

    def __init__(self, http: str, grpc: str, connections: int) -> None:
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._http = httpx.AsyncClient(base_url=http, limits=limits, timeout=TIMEOUT_S)
        self._grpc = AsyncClient(grpc)

    async def close(self) -> None:
        await self._http.aclose()
        await self._grpc.close()

    async def send(self, request: SoakRequest) -> Ended:
        began_s = time.monotonic()
        outcome, answers, detail = await self._send(request)
        return Ended(request, outcome, time.monotonic() - began_s, answers, detail)

    async def _send(self, request: SoakRequest) -> tuple[str, tuple[tuple[int, ...] | str, ...] | None, str]:
        cancels = request.behaviour is Behaviour.CANCELS
        try:
            async with asyncio.timeout(request.cancel_after_s if cancels else TIMEOUT_S + GRACE_S):
                answers = await (self._ask_grpc(request) if request.way is Way.GRPC else self._ask_http(request))
        except TimeoutError:
            return (CANCELLED if cancels else UNANSWERED), None, ""
        except _WrongAnswerError as error:
            return WRONG, None, str(error)
        except httpx.TransportError as error:
            return CUT, None, f"{type(error).__name__} {error}"
        except TandemError as error:
            return error.code, None, error.message
        except _RefusedError as error:
            return error.outcome(request), None, str(error)
        return COMPLETE, answers, ""

    async def _ask_grpc(self, request: SoakRequest) -> tuple[tuple[int, ...] | str, ...]:
        options = GenerateOptions(
            token_ids=request.token_ids,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
            ignore_eos=True,
            timeout_s=TIMEOUT_S,
        )
        if request.logprobs is not None:
            options["logprobs"] = request.logprobs
        stream = self._grpc.stream(**options)
        token_ids: list[int] = []
        logprobs: list[float] = []
        async with stream:
            async for delta in stream:
                token_ids.extend(delta.token_ids)
                logprobs.extend(logprob.logprob for logprob in delta.logprobs)
                if request.behaviour is Behaviour.READS_SLOWLY:
                    await asyncio.sleep(SLOW_READ_S)
        _check(len(token_ids) == request.max_tokens, f"{len(token_ids)} tokens instead of {request.max_tokens}")
        if request.logprobs is not None:
            _check(len(logprobs) == len(token_ids), f"{len(logprobs)} log-probabilities of {len(token_ids)} tokens")
            _check(all(math.isfinite(value) and value <= 1e-6 for value in logprobs), "an impossible log-probability")
        return (tuple(token_ids),)

    async def _ask_http(self, request: SoakRequest) -> tuple[tuple[int, ...] | str, ...]:
        path = "/v1/chat/completions" if request.way is Way.CHAT_STREAM else "/v1/completions"
        async with self._http.stream("POST", path, json=request.http_body()) as response:
            if response.status_code != 200:
                raise _RefusedError(response.status_code, await response.aread())
            if request.way is Way.HTTP:
                choices = json.loads(await response.aread())["choices"]
                _check(len(choices) == request.n, f"{len(choices)} choices instead of {request.n}")
                return tuple(choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"]))
            return await self._read_events(request, response)

    async def _read_events(self, request: SoakRequest, response: httpx.Response) -> tuple[str, ...]:
        texts = [""] * request.n
        finished = 0
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                _check(finished == request.n, f"{finished} of {request.n} choices have finished")
                return tuple(texts)
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise _RefusedError(200, line.removeprefix("data: ").encode())
            for choice in event["choices"]:
                is_chat = request.way is Way.CHAT_STREAM
                texts[choice["index"]] += (choice["delta"].get("content") if is_chat else choice["text"]) or ""
                finished += choice["finish_reason"] is not None
            if request.behaviour is Behaviour.READS_SLOWLY:
                await asyncio.sleep(SLOW_READ_S)
        raise httpx.ReadError("the stream ended without [DONE]")


class _RefusedError(Exception):
    """An error of the HTTP API."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"{status} {body[:300].decode(errors='replace')}")
        self._status = status
        try:
            self._code = str(json.loads(body)["error"]["code"])
        except (ValueError, KeyError, TypeError):
            self._code = "not an error of the API"

    def outcome(self, request: SoakRequest) -> str:
        if request.behaviour is Behaviour.BAD and 400 <= self._status < 500 and self._status != 429:
            return REFUSED
        return "internal" if self._code == "None" else self._code


def _check(is_right: bool, otherwise: str) -> None:
    if not is_right:
        raise _WrongAnswerError(otherwise)
