"""Load a running server as its users would: requests come when they come, however slow the answers are.

The SLO file says which requests (lengths, arrivals, classes) and what counts as served well. Each rate is one run of
`--requests` requests over HTTP, streamed, greedy, with answers of exactly the lengths drawn; the same lengths and the
same arrivals, stretched, at every rate. With --trace the requests and arrivals are the file's, stretched to each rate
if any is given. What prompts say is new in every run. Latency counts from the time at which a request was due.

The generator is one process with one thread. Every run says how late it sent, how late its event loop was and how much
of a core it used; a run in which that may have bent the figures is marked, and the exit status is then 3.

    tandem serve &
    python -m bench.load --url http://127.0.0.1:8000 --slo examples/slo-laptop.yaml --rates 1,2,4 --requests 200
"""

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Never

import uvloop
from tqdm import tqdm

from bench.load_client import LoadClient, served_model
from bench.load_result import LoadResult, records_as_json
from bench.load_run import run_load
from bench.processes import BenchError
from tandem.core.config_file import load_config
from tandem.core.errors import ConfigError, TandemError
from tandem.core.slo import SloClass
from tandem.core.slo_file import SloFile, WorkloadSection
from tandem.placement.evaluation.summary import render_text, summarise
from tandem.placement.workload.requests import RequestStream
from tandem.placement.workload.streams import make_stream
from tandem.placement.workload.traces import load_trace

GENERATOR_TOO_SLOW = 3


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What is to be sent where. `streams` has one entry per run, with the rate that is asked for."""

    url: str
    model: str
    classes: tuple[SloClass, ...]
    streams: tuple[tuple[float, RequestStream], ...]
    timeout_s: float
    max_lag_s: float
    with_timelines: bool


def make_streams(
    slo: SloFile, trace: Path | None, rates: Sequence[float], count: int, seed: int
) -> tuple[tuple[float, RequestStream], ...]:
    """(rate, requests) of each run, equal but for their times, and equal to what `tandem simulate` makes of the same
    file, rate, count and seed. Without rates: the trace's own, or the workload's. Raises ConfigError."""
    section = slo.workload if trace is None else WorkloadSection(trace=trace)
    if not rates and section.trace is not None:
        rates = (load_trace(section.trace).head(count).rate,)
    elif not rates and section.rate != "max":
        rates = (section.rate,)
    if not rates or min(rates) <= 0:
        raise ConfigError("neither the SLO file nor the trace says how many requests come per second; give --rates")
    return tuple((rate, make_stream(section, slo.slo, count=count, rate=rate, seed=seed)) for rate in rates)


async def run_plan(plan: LoadPlan, on_result: Callable[[float, LoadResult], None]) -> None:
    """All runs, one after the other; `on_result` is called after each, also after one that was cut short, which is the
    last. SIGINT and SIGTERM cut a run short. Raises BenchError if the server is not there."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    for rate, stream in plan.streams:
        result = await _run_one(plan, rate, stream, stop)
        on_result(rate, result)
        if result.stopped is not None:
            return


async def _run_one(plan: LoadPlan, rate: float, stream: RequestStream, stop: asyncio.Event) -> LoadResult:
    client = LoadClient(plan.url)
    bar = tqdm(total=len(stream), desc=f"{rate:g} requests/s", unit="request", disable=None, leave=False)
    try:
        return await run_load(
            client,
            stream,
            plan.model,
            timeout_s=plan.timeout_s,
            with_timelines=plan.with_timelines,
            stop=stop,
            on_done=lambda record: _advance(bar),
        )
    finally:
        client.close()
        bar.close()


def _advance(bar: "tqdm[Never]") -> None:
    bar.update()


class _Report:
    """Prints each run and keeps it for the file."""

    def __init__(self, plan: LoadPlan) -> None:
        self._plan = plan
        self.runs: list[dict[str, object]] = []
        self.faults = 0
        self.stopped: str | None = None

    def add(self, rate: float, result: LoadResult) -> None:
        self.stopped = result.stopped
        failed = [record for record in result.records if record.error is not None]
        fault = result.health.fault(self._plan.max_lag_s)
        self.faults += fault is not None
        print(f"\n--- {rate:g} requests/s")
        print(render_text(summarise(result.as_simulation(), self._plan.classes)))
        if failed:
            print(f"{len(failed)} failed; the first: {failed[0].error}")
        print(result.health.text())
        if fault is not None:
            print(f"DO NOT TRUST this run: {fault}")
        if result.stopped is not None:
            print(f"cut short: {result.stopped}")
        sys.stdout.flush()
        self.runs.append(
            {
                "rate": rate,
                "duration_s": result.duration_s,
                "stopped": result.stopped,
                "generator": result.health.summary() | {"fault": fault},
                "requests": records_as_json(result),
            }
        )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--slo", type=Path, required=True, metavar="FILE", help="SLO file: workload and targets")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="requests of this file instead of the workload's")
    parser.add_argument("--rates", type=_rates, default=(), metavar="R,R,..", help="requests per second, a run each")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="in each run (default: %(default)s)")
    parser.add_argument("--model", help="name in the API (default: the first one served)")
    parser.add_argument("--seed", type=int, help="of lengths and arrivals (default: the SLO file's search.seed)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="for one answer (default: %(default)s)"
    )
    parser.add_argument(
        "--max-lag-ms", type=float, default=20.0, help="p99 of the send lag beyond which a run is marked (%(default)s)"
    )
    parser.add_argument("--timelines", action="store_true", help="ask the server for timelines too (Tandem only)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record of every request there")
    return parser.parse_args(argv)


def _rates(text: str) -> tuple[float, ...]:
    rates = tuple(float(part) for part in text.split(","))
    if min(rates) <= 0:
        raise ValueError("rates are more than 0")
    return rates


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: the server failed; 2: a wrong file or argument; 3: a run in which the generator was too slow."""
    args = parse_arguments(argv)
    try:
        slo = load_config(args.slo, SloFile)
        seed = slo.search.seed if args.seed is None else args.seed
        plan = LoadPlan(
            url=args.url,
            model=args.model or served_model(args.url),
            classes=slo.slo,
            streams=make_streams(slo, args.trace, args.rates, args.requests, seed),
            timeout_s=args.timeout,
            max_lag_s=args.max_lag_ms / 1e3,
            with_timelines=args.timelines,
        )
        load = os.getloadavg()
        print(f"load average {load[0]:.1f} {load[1]:.1f} {load[2]:.1f} on {os.cpu_count()} cores", flush=True)
        report = _Report(plan)
        uvloop.run(run_plan(plan, report.add))
    except (BenchError, TandemError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    if args.json is not None:
        args.json.write_text(
            json.dumps({"url": plan.url, "model": plan.model, "seed": seed, "load_average": load, "runs": report.runs})
        )
    if report.stopped is not None:
        return 130 if report.stopped == "interrupted" else 1
    return GENERATOR_TOO_SLOW if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
