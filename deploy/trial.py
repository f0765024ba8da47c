"""Sends requests through a running cluster, to see whether each way through it works.

The router chooses instances by itself. So a pair is tried past it: with a router's own dispatcher, here, that knows no
other instances. The instances see one more router for a moment.
"""

import asyncio
import contextlib
import json
import secrets
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from random import Random

from tandem.client import AsyncClient
from tandem.client_tls import ClientTls
from tandem.core.clock import Clock
from tandem.core.errors import UnavailableError
from tandem.core.request import GenerationRequest, SamplingParams
from tandem.core.session import InstanceState, InstanceStatus, Role
from tandem.core.tls import ClusterTls
from tandem.router.dispatch import Dispatcher
from tandem.scheduling.routing_settings import RoutingSettings
from tandem.wire.sessions import InstanceSession

MAX_PAIRS = 64
_TOKENS = 2  # the first one is prefill's; the second one needs the KV in decode
_PROMPT = "a"
_PROMPT_TOKENS = 20
_VOCABULARY = 8  # every model has that many tokens
_CONNECT_S = 10.0
_POLL_S = 0.01


def ways_through(instances: Iterable[InstanceStatus]) -> list[tuple[InstanceStatus, ...]]:
    """Each pair of a prefill and a decode instance, and each colocated instance, of those that are ready. With more
    than `MAX_PAIRS` pairs, some, with each instance in one of them."""
    ready = [status for status in instances if status.state is InstanceState.READY]
    prefill, decode, colocated = (
        [status for status in ready if status.role is role] for role in (Role.PREFILL, Role.DECODE, Role.COLOCATED)
    )
    pairs = [(source, reader) for source in prefill for reader in decode]
    if len(pairs) > MAX_PAIRS:
        count = max(len(prefill), len(decode))
        pairs = [(prefill[index % len(prefill)], decode[index % len(decode)]) for index in range(count)]
    return [*pairs, *((status,) for status in colocated)]


async def try_instances(
    instances: tuple[InstanceStatus, ...],
    model: str,
    token: str,
    timeout_s: float,
    clock: Clock,
    tls: ClusterTls | None = None,
) -> float:
    """Generate two tokens from a short random prompt, on these instances and no others; returns the seconds. Raises the
    TandemError with which that ends."""
    dispatcher = Dispatcher(
        model=model,
        open_session=partial(InstanceSession.open, clock=clock, token=token, tls=tls),
        heartbeat_timeout_s=2 * (timeout_s + _CONNECT_S),
        clock=clock,
        routing=RoutingSettings(max_attempts=1, local_prefill=False),
        request_timeout_s=timeout_s,
    )
    running = asyncio.create_task(dispatcher.fleet.run(), name="fleet")
    try:
        for status in instances:
            # Whether they reach each other is what is tried, and what they have said of it may be over by now.
            dispatcher.fleet.heartbeat(replace(status, unreachable_peers=()))
        await _until_connected(dispatcher, instances)
        began_s = clock.now_s()
        generation = dispatcher.start(_request(instances), began_s)
        try:
            async for _ in generation:
                pass
        finally:
            await generation.aclose()
        return clock.now_s() - began_s
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def try_router(
    grpc_address: str, timeout_s: float, clock: Clock, api_key: str | None = None, tls: ClientTls | None = None
) -> float:
    """The same as a client, through the router's public port."""
    began_s = clock.now_s()
    async with AsyncClient(grpc_address, api_key=api_key, tls=tls) as client:
        await client.generate(prompt=_PROMPT, max_tokens=_TOKENS, timeout_s=timeout_s)
    return clock.now_s() - began_s


def try_http(
    http_address: str,
    model: str,
    timeout_s: float,
    clock: Clock,
    api_key: str | None = None,
    tls: ClientTls | None = None,
) -> float:
    """The same over HTTP."""
    began_s = clock.now_s()
    body = json.dumps({"model": model, "prompt": _PROMPT, "max_tokens": _TOKENS}).encode()
    headers, context = {"Content-Type": "application/json"}, None
    url = f"{'http' if tls is None else 'https'}://{http_address}/v1/completions"
    if tls is not None:
        context = ssl.create_default_context(cafile=tls.ca)
        if tls.certificate is not None:
            context.load_cert_chain(tls.certificate, tls.key)
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    try:
        request = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(request, timeout=timeout_s, context=context) as response:
            response.read()
    except urllib.error.HTTPError as error:
        with error:
            raise UnavailableError(f"status {error.code}: {error.read(300).decode(errors='replace')}") from error
    except OSError as error:
        raise UnavailableError(f"no answer ({error})") from error
    return clock.now_s() - began_s


async def _until_connected(dispatcher: Dispatcher, instances: tuple[InstanceStatus, ...]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CONNECT_S):
            while not dispatcher.is_serving:  # noqa: ASYNC110 - sessions tell no event
                await asyncio.sleep(_POLL_S)
            return
    addresses = " and ".join(status.address for status in instances)
    raise UnavailableError(f"no session with {addresses} within {_CONNECT_S:g} s")


def _request(instances: tuple[InstanceStatus, ...]) -> GenerationRequest:
    """A prompt that no prefix cache knows."""
    length = max(1, min(_PROMPT_TOKENS, *(status.max_model_len - _TOKENS for status in instances)))
    random = Random(secrets.randbits(64))
    return GenerationRequest(
        f"doctor-{secrets.token_hex(8)}",
        tuple(random.randrange(_VOCABULARY) for _ in range(length)),
        SamplingParams(temperature=0.0, max_tokens=_TOKENS, ignore_eos=True),
    )
