"""Measures what running workers add to the engine's steps, and the request path around them, on a small cluster.

The two workers share memory, caches and cores of one machine, so each is measured alone and while the other computes.
Requests of a few dozen output tokens keep decode busy, as many at once as the batch shall have. Prompts sent one after
another, with or without pauses, keep prefill busy; several prompts at once show the cost of concurrent transfers. The
timelines and the clients' times are compared with the cost model of the engine alone (`profiling.serving_fit`).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from itertools import cycle
from pathlib import Path
from random import Random

from tandem.profiling.cluster import MODEL_NAME, ClusterLauncher
from tandem.profiling.completion_client import CompletionClient
from tandem.profiling.errors import MeasurementError
from tandem.profiling.serving_samples import ColocatedSamples, LoadPeriod, RequestSample, ServingSamples

FIRST_TOKEN_ID, LAST_TOKEN_ID = 300, 1000  # plain tokens in every vocabulary of more than a thousand
_PROMPT_LENGTHS = (32, 384, 64, 160)  # in turns
_BATCHES = (1, 2, 4, 8)
_TINY_PROMPT = 4  # tokens, of requests that keep decode busy: hardly any work for prefill
_SHORT_OUTPUT = 3  # tokens, the fewest that show a transfer and a decode step after it
# (least, most) output tokens, in turns. Requests that end together would leave decode idle; short requests mean many
# admissions.
_OUTPUT_RANGES = ((8, 24), (16, 48), (24, 72), (40, 100))
_LONG_OUTPUT = _OUTPUT_RANGES[-1]  # their own prompts come seldom, and leave the pauses between other prompts
_CONCURRENT_CLIENTS = 8  # whose prompts are computed and transferred together
_MAX_PAUSE_S = 0.3  # between prompts: the first step after a pause takes longer
_TIMEOUT_S = 60.0
_ATTEMPTS = 3
_WITH_TRANSFER = frozenset({"prefill_s", "transfer_s", "decode_queue_s"})
_COLOCATED = frozenset({"prefill_s"})
_WARM_UP_S = 1.0
_COLOCATED_BATCHES = (1, 4, 16)


async def measure_serving(
    model: Path,
    engine: Mapping[str, object],
    budget_s: float,
    progress: Callable[[float], None] = lambda share: None,
    *,
    max_model_len: int | None = None,
) -> ServingSamples:
    """Starts a cluster whose instances have the settings `engine`, measures for about `budget_s`, and stops it.
    `max_model_len`: of the model; None: long enough for every request here.

    Raises MeasurementError."""
    async with ClusterLauncher(model) as launcher:
        router = await launcher.start_router()
        await launcher.start_workers(router, engine)
        return await measure_running(f"http://{router.http}", budget_s, progress, max_model_len=max_model_len)


async def measure_colocated(
    model: Path, engine: Mapping[str, object], budget_s: float, *, max_model_len: int | None = None
) -> ColocatedSamples:
    """Starts a colocated instance with the settings `engine`, measures for about `budget_s`, and stops it. Half of the
    time is for prompts, most of them after a pause, as under light load. Raises MeasurementError."""
    async with ClusterLauncher(model) as launcher:
        router = await launcher.start_router()
        await launcher.start_colocated(router, engine)
        async with open_probe(f"http://{router.http}", max_model_len, needed_parts=_COLOCATED) as probe:
            await probe.decode(2, _WARM_UP_S, _OUTPUT_RANGES[0])
            prompted = await probe.prefill_alone(0.5 * budget_s, max_pause_s=_MAX_PAUSE_S)
            share_s = 0.5 * budget_s / len(_COLOCATED_BATCHES)
            decoding = [
                LoadPeriod(await probe.decode(batch, share_s, _LONG_OUTPUT), batch=batch)
                for batch in _COLOCATED_BATCHES
            ]
    return ColocatedSamples(tuple(prompted), tuple(decoding))


async def measure_running(
    url: str,
    budget_s: float,
    progress: Callable[[float], None] = lambda share: None,
    *,
    max_model_len: int | None = None,
) -> ServingSamples:
    """As `measure_serving`, on a cluster of one worker of each role that runs already and is idle.

    Raises MeasurementError."""
    samples = ServingSamples()
    async with open_probe(url, max_model_len) as probe:
        await probe.steady(batch=2, duration_s=_WARM_UP_S)
        for index, batch in enumerate(_BATCHES):
            samples.add(await probe.all_kinds(batch, budget_s / len(_BATCHES)))
            progress((index + 1) / len(_BATCHES))
    if not samples.can_be_fitted:
        raise MeasurementError(f"in {budget_s:.0f} s no prompt was computed while decode was busy; measure for longer")
    return samples


@asynccontextmanager
async def open_probe(
    url: str, max_model_len: int | None = None, *, needed_parts: frozenset[str] = _WITH_TRANSFER
) -> AsyncIterator["ServingProbe"]:
    """`needed_parts`: those of a timeline without which a request was not served as it should be."""
    client = CompletionClient(url)
    try:
        yield ServingProbe(client, max_model_len, needed_parts)
    finally:
        client.close()


class ServingProbe:
    """Sends requests that keep one or both workers busy, and returns their samples. Every method raises
    MeasurementError."""

    def __init__(
        self, client: CompletionClient, max_model_len: int | None = None, needed_parts: frozenset[str] = _WITH_TRANSFER
    ) -> None:
        self._client = client
        self._needed_parts = needed_parts
        longest = max(_PROMPT_LENGTHS)
        if max_model_len is not None:
            longest = max_model_len - max(most for _, most in _OUTPUT_RANGES)
        self._lengths = cycle(min(length, longest) for length in _PROMPT_LENGTHS)
        self._output_ranges = cycle(_OUTPUT_RANGES)
        self._random = Random()  # without a seed: repeated prompts would be in the cluster's prefix cache

    async def all_kinds(self, batch: int, duration_s: float) -> ServingSamples:
        """Samples of every kind, with `batch` requests in decode at once."""
        alone = await self.prefill_alone(0.1 * duration_s)
        decoding = LoadPeriod(await self.decode(batch, 0.15 * duration_s, next(self._output_ranges)))
        steady = await self.steady(batch, 0.25 * duration_s)
        paused = await self.load_both(batch, 0.25 * duration_s, _LONG_OUTPUT, clients=1, max_pause_s=_MAX_PAUSE_S)
        concurrent = await self.load_both(
            batch, 0.25 * duration_s, next(self._output_ranges), clients=_CONCURRENT_CLIENTS
        )
        return ServingSamples(alone, [decoding], [steady], [paused], [concurrent])

    async def steady(self, batch: int, duration_s: float) -> LoadPeriod:
        """Prefill computes one prompt after another, and sends KV while it computes the next prompt."""
        return await self.load_both(batch, duration_s, next(self._output_ranges), clients=2)

    async def load_both(
        self,
        batch: int,
        duration_s: float,
        output_range: tuple[int, int],
        *,
        clients: int,
        max_pause_s: float = 0.0,
    ) -> LoadPeriod:
        """`batch` requests in decode at once for about `duration_s`, and until they end prompts of `clients` clients,
        each of which sends one prompt after another."""
        prompted: list[RequestSample] = []
        tasks = [
            asyncio.create_task(self._send_prompts(prompted, max_pause_s), name=f"prompts-{client}")
            for client in range(clients)
        ]
        decoding = await self.decode(batch, duration_s, output_range)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        return LoadPeriod(decoding, tuple(prompted))

    async def prefill_alone(self, duration_s: float, *, max_pause_s: float = 0.0) -> list[RequestSample]:
        """One prompt after another for `duration_s`, at least one, with pauses between them, and nothing else."""
        began_s = time.monotonic()
        prompted = [await self._send_prompt()]
        while time.monotonic() - began_s < duration_s:
            await asyncio.sleep(self._random.uniform(0.0, max_pause_s))
            prompted.append(await self._send_prompt())
        return prompted

    async def decode(self, batch: int, duration_s: float, output_range: tuple[int, int]) -> tuple[RequestSample, ...]:
        """`batch` clients for `duration_s`, each with one request after another, of output lengths in the range."""
        began_s = time.monotonic()
        decoding: list[RequestSample] = []

        async def send_requests() -> None:
            while not decoding or time.monotonic() - began_s < duration_s:
                decoding.append(await self._send(_TINY_PROMPT, self._random.randint(*output_range)))

        await asyncio.gather(*(send_requests() for _ in range(batch)))
        return tuple(decoding)

    async def _send_prompts(self, prompted: list[RequestSample], max_pause_s: float) -> None:
        while True:
            await asyncio.sleep(self._random.uniform(0.0, max_pause_s))
            prompted.append(await self._send_prompt())

    async def _send_prompt(self) -> RequestSample:
        return await self._send(next(self._lengths), _SHORT_OUTPUT)

    async def _send(self, num_tokens: int, max_tokens: int) -> RequestSample:
        """A sample with the needed parts. On a busy machine an instance may look lost to the router, and the other one
        then serves the whole request, without a transfer: such a request is sent again."""
        for _ in range(_ATTEMPTS):
            prompt = [self._random.randrange(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(num_tokens)]
            request = self._client.make_request(MODEL_NAME, prompt, max_tokens, with_timeline=True)
            timed = await self._client.complete(request, _TIMEOUT_S)
            if timed.error is not None or timed.first_s is None:
                raise MeasurementError(f"the measured cluster failed: {timed.error}")
            assert timed.usage is not None
            extra = timed.usage["tandem"]
            assert isinstance(extra, dict), "a timeline was requested"
            timeline = extra["timeline"]
            if timeline["parts"].keys() >= self._needed_parts:
                return RequestSample.from_timeline(
                    num_tokens, max_tokens, timed.sent_s, timed.first_s, timed.last_s, timeline
                )
        raise MeasurementError(
            f"{_ATTEMPTS} requests in turn were served without a transfer of KV: the machine is too busy to be "
            "measured; run nothing else on it meanwhile"
        )
