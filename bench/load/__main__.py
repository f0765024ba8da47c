"""How does a running server meet its SLO under load? Sends requests at scheduled times, however slow the server is.

The SLO file defines the requests (lengths, arrivals, classes) and the targets. Each rate is one run of `--requests`
requests over HTTP: streamed, greedy, with exactly the drawn output lengths. All rates use the same lengths, and the
same arrivals, stretched. With --trace the requests and arrivals are those of the file, stretched to each given rate.
Prompts differ in every run. Latency counts from the scheduled time of a request.

The generator is one process with one thread. Every run reports the generator's send lag, the lag of its event loop and
its share of a core. A run that these may have distorted is marked, and the exit status is then 3.

    tandem serve &
    python -m bench.load --url http://127.0.0.1:8000 --slo examples/slo-laptop.yaml --rates 1,2,4 --requests 200
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Never

import orjson
import uvloop
from tqdm import tqdm

from bench.load.requests import make_streams
from bench.load.result import GENERATOR_TOO_SLOW, LoadResult, records_as_json
from bench.load.run import run_load
from tandem.core.config_file import load_config
from tandem.core.errors import ConfigError, TandemError
from tandem.core.slo import SloClass
from tandem.core.slo_file import SloFile
from tandem.placement.evaluation.summary import render_text, summarise
from tandem.placement.workload.requests import RequestStream
from tandem.profiling.completion_client import CompletionClient, ServerGoneError
from tandem.profiling.errors import MeasurementError


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The runs against the server at `url`. `streams`: (requested rate, requests) of each run."""

    url: str
    model: str
    classes: tuple[SloClass, ...]
    streams: tuple[tuple[float, RequestStream], ...]
    timeout_s: float
    max_lag_s: float
    with_timelines: bool


async def run_plan(plan: LoadPlan, on_result: Callable[[float, LoadResult], None]) -> None:
    """All runs, one after the other; `on_result` is called after each. SIGINT, SIGTERM and the loss of the server end a
    run early, and no other run follows. Raises ServerGoneError if there is no server at the beginning."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    for rate, stream in plan.streams:
        result = await _run_one(plan, rate, stream, stop)
        on_result(rate, result)
        if result.stopped is not None:
            return


async def _run_one(plan: LoadPlan, rate: float, stream: RequestStream, stop: asyncio.Event) -> LoadResult:
    client = CompletionClient(plan.url)
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
    """Prints each run and keeps it for the JSON file."""

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
            print(f"ended early: {result.stopped}")
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
    parser.add_argument("--trace", type=Path, metavar="FILE", help="send the requests of this file instead")
    parser.add_argument("--rates", type=_rates, default=(), metavar="R,R,..", help="requests per second, a run each")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="in each run (default: %(default)s)")
    parser.add_argument("--model", help="its name in the API (default: the first model of the server)")
    parser.add_argument("--seed", type=int, help="of lengths and arrivals (default: the SLO file's search.seed)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="for one response (default: %(default)s)"
    )
    parser.add_argument(
        "--max-lag-ms", type=float, default=20.0, help="a run with a higher p99 of the send lag is marked (%(default)s)"
    )
    parser.add_argument("--timelines", action="store_true", help="ask the server for timelines too (Tandem only)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record of every request there")
    return parser.parse_args(argv)


def _rates(text: str) -> tuple[float, ...]:
    rates = tuple(float(part) for part in text.split(","))
    if min(rates) <= 0:
        raise ValueError("rates are more than 0")
    return rates


def served_model(url: str) -> str:
    """The name of the first model that the server at `url` serves. Blocks; raises MeasurementError."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=10.0) as response:
            return str(orjson.loads(response.read())["data"][0]["id"])
    except urllib.error.HTTPError as error:
        raise MeasurementError(f"{url}/v1/models answers with status {error.code}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ServerGoneError(f"nothing answers at {url} ({getattr(reason, 'strerror', None) or reason})") from error
    except (KeyError, IndexError, TypeError) as error:
        raise MeasurementError(f"{url} does not answer as an OpenAI API does") from error


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: the server failed; 2: a wrong file or argument; 3: the generator was too slow in a run."""
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
    except TandemError as error:
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
