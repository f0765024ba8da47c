"""What the processes of a cluster hold while it serves, and how fast that grows with the requests."""

import asyncio
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
import numpy as np
import psutil

from bench.common.served import ServedProcess

SAMPLE_PERIOD_S = 1.0
WARM_UP = 1 / 4  # of a life's samples, and
WARM_UP_REQUESTS = 3000  # of a life: what is remembered of so many is bounded, and fills first
ENOUGH_REQUESTS = 5000  # after these, to judge growth
MIN_SAMPLES = 30
NORMAL_95 = 1.96

_POOL = "/memfd:tandem-kv"
_GAUGE = re.compile(r'^tandem_(?:instance|router)_python_blocks(?:\{.*?instance="([^"]*)".*\})? (\S+)', re.MULTILINE)
_BLOCKS = re.compile(r'^tandem_kv_blocks\{.*owner="(\w+)".*\} (\S+)', re.MULTILINE)

Key = tuple[str, str]  # a life of a process (its name and pid, or an instance's id), and what is counted


@dataclass(frozen=True, slots=True)
class Growth:
    """`per_request` with the half-width of its interval of 95 %, which takes into account that consecutive samples are
    alike. `first` and `last` are means of the tenths at both ends."""

    process: str
    what: str
    samples: int
    requests: int
    is_warm: bool
    first: float
    last: float
    per_request: float
    half_width: float

    def exceeds(self, limit: float) -> bool:
        """For certain."""
        return self.has_enough and self.per_request - self.half_width > limit

    @property
    def has_enough(self) -> bool:
        """Whether there were enough requests to tell growth from caches that fill."""
        return self.is_warm and self.requests >= ENOUGH_REQUESTS


@dataclass(slots=True)
class Samples:
    """Of each life of each process: requests answered by the cluster so far, and the value then."""

    series: dict[Key, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    most_leaked_blocks: int = 0

    def add(self, life: str, what: str, requests: int, value: float) -> None:
        self.series[life, what].append((requests, value))

    def growths(self) -> list[Growth]:
        """Of the lives that were long enough."""
        return [
            growth
            for (life, what), series in sorted(self.series.items())
            if (growth := fit_growth(life, what, series)) is not None
        ]


def fit_growth(life: str, what: str, series: Sequence[tuple[int, float]]) -> Growth | None:
    """None if the life was too short to say anything."""
    born = series[0][0]
    warm = [pair for pair in series[int(len(series) * WARM_UP) :] if pair[0] - born >= WARM_UP_REQUESTS]
    is_warm = len(warm) >= MIN_SAMPLES
    rest = np.asarray(warm if is_warm else series[int(len(series) * WARM_UP) :], dtype=float)
    if len(rest) < MIN_SAMPLES or rest[-1, 0] == rest[0, 0]:
        return None
    requests, values = rest[:, 0], rest[:, 1]
    centred = requests - requests.mean()
    slope = float((centred * values).sum() / (centred**2).sum())
    residuals = values - values.mean() - slope * centred
    error = math.sqrt(float((residuals**2).sum()) / max(1, len(rest) - 2) / float((centred**2).sum()))
    spread = float((residuals**2).sum())
    alike = float((residuals[1:] * residuals[:-1]).sum() / spread) if spread else 0.0
    alike = min(0.99, max(0.0, alike))
    half_width = NORMAL_95 * error * math.sqrt((1 + alike) / (1 - alike))
    tenth = max(1, len(rest) // 10)
    return Growth(
        process=life,
        what=what,
        samples=len(rest),
        requests=int(requests[-1] - requests[0]),
        is_warm=is_warm,
        first=float(values[:tenth].mean()),
        last=float(values[-tenth:].mean()),
        per_request=slope,
        half_width=half_width,
    )


class Sampler:
    """Looks every second, from outside: at the processes by their pids, and at the router's /metrics."""

    def __init__(self, http: str, processes: Callable[[], list[ServedProcess]], answered: Callable[[], int]) -> None:
        self.samples = Samples()
        self._http = http
        self._processes = processes
        self._answered = answered

    async def run(self) -> None:
        """Until cancelled."""
        async with httpx.AsyncClient(timeout=2.0) as client:
            due_s = time.monotonic()
            while True:
                await asyncio.to_thread(self.look_at_processes)
                await self._look_at_metrics(client)
                due_s = max(time.monotonic(), due_s + SAMPLE_PERIOD_S)
                await asyncio.sleep(due_s - time.monotonic())

    def look_at_processes(self) -> dict[str, int]:
        """Returns how many KV pools each of them maps."""
        requests, mapped_pools = self._answered(), {}
        for served in self._processes():
            life = f"{served.name} ({served.pid})"
            try:
                process = psutil.Process(served.pid)
                if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                    continue
                with process.oneshot():
                    self.samples.add(life, "resident bytes", requests, process.memory_info().rss)
                    self.samples.add(life, "threads", requests, process.num_threads())
                    self.samples.add(life, "descriptors", requests, process.num_fds())
                pools = sum(mapped.path.startswith(_POOL) for mapped in process.memory_maps(grouped=False))
            except (psutil.Error, OSError):
                continue  # it has just ended
            mapped_pools[life] = pools
            self.samples.add(life, "mapped pools", requests, pools)
        return mapped_pools

    async def _look_at_metrics(self, client: httpx.AsyncClient) -> None:
        requests = self._answered()
        try:
            page = (await client.get(f"{self._http}/metrics")).text
        except httpx.HTTPError:
            return  # the router is away
        for instance, value in _GAUGE.findall(page):
            self.samples.add(instance or "router", "python blocks", requests, float(value))
        leaked = sum(int(float(value)) for owner, value in _BLOCKS.findall(page) if owner == "leaked")
        self.samples.most_leaked_blocks = max(leaked, self.samples.most_leaked_blocks)


def block_counts(page: str) -> dict[str, int]:
    """KV blocks of all instances together by owner, from a page of /metrics."""
    counts: dict[str, int] = defaultdict(int)
    for owner, value in _BLOCKS.findall(page):
        counts[owner] += int(float(value))
    return dict(counts)
