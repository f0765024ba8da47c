"""How fast is the simulator at scale? A day of Azure's traffic on a thousand instances, with the router's own code.

Arrivals follow the hourly rates of the Azure LLM inference trace of 2024 (Poisson within an hour), lengths its
published distribution. The instances are one-GPU Llama-3.1-8B on A100s by the roofline, half prefill, half decode. They
are far more than this traffic needs: the benchmark measures the simulator and the router's selection, not a plan.

The day is cut into slices, which run in parallel processes. Each slice begins with the last minutes of the previous
one, which are simulated and not counted, so that no slice starts on an empty cluster.

    python -m bench.scale --hours 1          a quick check
    python -m bench.scale                    a day on 1,000 instances
    python -m bench.scale --growth           one hour on 10, 100, 1,000 and 4,000 instances
"""

import argparse
import csv
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from bench.common.data_folder import add_data_argument
from tandem.core.parallel import ParallelShape
from tandem.core.timeline import Stage
from tandem.placement.costs.hardware import devices
from tandem.placement.costs.models import model_shape
from tandem.placement.costs.roofline import RooflineSource
from tandem.placement.simulator import simulate
from tandem.placement.simulator.deployment import Deployment, InstanceSpec, NetworkSpec
from tandem.placement.workload.requests import Floats, RequestStream

_RATES = Path("traces") / "azure_2024_hourly_rate_digitised.csv"
_LENGTHS = Path("lengths") / "azure_2024_cdf_digitised.csv"
_MODEL, _DEVICE, _SHAPE = "Llama-3.1-8B", "A100-80GB-SXM4", ParallelShape(1, 1)
_BLOCK_TOKENS = 16
_WARM_UP_S = 600.0
_NVLINK_BYTES_PER_S, _NIC_BYTES_PER_S, _DEVICES_PER_NODE = 250e9, 22e9, 8
_TTFT_S, _TPOT_S = 0.5, 0.05


@dataclass(frozen=True, slots=True)
class DayTraffic:
    """Hourly rates in requests per second, and inverse distributions: tokens at cumulative shares."""

    rates: Floats
    prompt_cdf: tuple[Floats, Floats]
    output_cdf: tuple[Floats, Floats]


@dataclass(frozen=True, slots=True)
class DaySlice:
    """The part of one process: hours [begin_h, end_h) of the traffic."""

    traffic: DayTraffic
    num_instances: int
    begin_h: int
    end_h: int
    seed: int


@dataclass(frozen=True, slots=True)
class SliceResult:
    """`hourly` has a row per hour: requests, requests that met both targets, mean TTFT and mean TPOT in seconds."""

    hourly: Floats
    num_simulated: int
    wall_s: float
    peak_bytes: int


def read_traffic(data: Path, workload: str) -> DayTraffic:
    """`workload`: coding or conversation. Raises FileNotFoundError."""
    with (data / _RATES).open(encoding="utf-8", newline="") as file:
        rates = [float(row["requests_per_s"]) for row in csv.DictReader(file) if row["workload"] == workload]
    with (data / _LENGTHS).open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["workload"] == workload]

    def inverse(quantity: str) -> tuple[Floats, Floats]:
        points = [(float(r["cdf_percent"]) / 100, float(r["tokens"])) for r in rows if r["quantity"] == quantity]
        shares, tokens = np.array(sorted(points)).T
        return shares, tokens

    return DayTraffic(np.array(rates), inverse("input_tokens"), inverse("output_tokens"))


def make_hours(traffic: DayTraffic, begin_h: int, end_h: int, seed: int) -> RequestStream:
    """Requests of these hours, seconds since hour 0. Each hour has its own random numbers, so that two slices have the
    same requests in an hour that they share."""
    arrivals, prompts, outputs = [], [], []
    for hour in range(begin_h, end_h):
        rng = np.random.default_rng((seed, hour))
        count = int(rng.poisson(traffic.rates[hour] * 3600))
        arrivals.append(hour * 3600 + np.sort(rng.random(count)) * 3600)
        prompts.append(_draw(traffic.prompt_cdf, rng.random(count)))
        outputs.append(_draw(traffic.output_cdf, rng.random(count)))
    return RequestStream.make(np.concatenate(arrivals), np.concatenate(prompts), np.concatenate(outputs))


def _draw(cdf: tuple[Floats, Floats], uniform: Floats) -> npt.NDArray[np.int64]:
    return np.maximum(1, np.rint(np.interp(uniform, *cdf))).astype(np.int64)


def make_deployment(num_instances: int) -> Deployment:
    """Half prefill, half decode, in nodes of eight that hold four of each."""
    source = RooflineSource(model_shape(_MODEL), devices())
    cost = source.cost_model(_DEVICE, _SHAPE)
    assert cost is not None
    num_blocks = source.kv_tokens(_DEVICE, _SHAPE) // _BLOCK_TOKENS
    instances = tuple(
        InstanceSpec(
            instance_id=f"{role}-{number}",
            role=role,
            cost=cost,
            num_blocks=num_blocks,
            block_size=_BLOCK_TOKENS,
            node=number // (_DEVICES_PER_NODE // 2),
        )
        for number in range(num_instances // 2)
        for role in ("prefill", "decode")
    )
    network = NetworkSpec(
        kv_bytes_per_token=model_shape(_MODEL).kv_bytes_per_token,
        intra_node_bytes_per_s=_NVLINK_BYTES_PER_S,
        inter_node_bytes_per_s=_NIC_BYTES_PER_S,
    )
    return Deployment(instances, network)


def run_slice(part: DaySlice) -> SliceResult:
    """Also draws the hour before the slice; its last minutes are simulated as warm-up."""
    stream = make_hours(part.traffic, max(0, part.begin_h - 1), part.end_h, part.seed)
    first = int(np.searchsorted(stream.arrival_s, part.begin_h * 3600 - _WARM_UP_S))
    stream = stream.select(slice(first, None))
    began_s = time.perf_counter()
    result = simulate(make_deployment(part.num_instances), stream)
    wall_s = time.perf_counter() - began_s
    ttft_s, tpot_s = result.ttft_s, result.tpot_s
    met = (ttft_s <= _TTFT_S) & (np.isnan(tpot_s) | (tpot_s <= _TPOT_S)) & ~np.isnan(result.stage(Stage.FINISHED))
    hour = (stream.arrival_s // 3600).astype(np.int64)
    rows = []
    for h in range(part.begin_h, part.end_h):
        here = hour == h
        rows.append((here.sum(), met[here].sum(), np.nanmean(ttft_s[here]), np.nanmean(tpot_s[here])))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return SliceResult(np.array(rows, dtype=np.float64), len(stream), wall_s, peak_bytes)


def run_hours(traffic: DayTraffic, num_instances: int, hours: int, workers: int, seed: int) -> list[SliceResult]:
    """All hours, cut into one slice for each worker."""
    ends = [round(hours * part / workers) for part in range(workers + 1)]
    slices = [DaySlice(traffic, num_instances, a, b, seed) for a, b in pairwise(ends) if b > a]
    with ProcessPoolExecutor(workers) as pool:
        bar = tqdm(pool.map(run_slice, slices), total=len(slices), unit="slice", disable=not sys.stderr.isatty())
        return list(bar)


def _print_day(results: Sequence[SliceResult], wall_s: float, hours: int) -> None:
    hourly = np.concatenate([result.hourly for result in results])
    print(f"{'hour':>4} {'requests':>9} {'req/s':>7} {'attained':>9} {'TTFT ms':>8} {'TPOT ms':>8}")
    for hour, (requests, met, ttft_s, tpot_s) in enumerate(hourly):
        share = f"{100 * met / requests:.2f} %"
        print(
            f"{hour:>4} {requests:>9.0f} {requests / 3600:>7.1f} {share:>9} {1e3 * ttft_s:>8.1f} {1e3 * tpot_s:>8.2f}"
        )
    requests = hourly[:, 0].sum()
    simulated = sum(result.num_simulated for result in results)
    cpu_s = sum(result.wall_s for result in results)
    peak_gib = sum(result.peak_bytes for result in results) / 2**30
    print(f"{requests:,.0f} requests of {hours} h in {wall_s:.0f} s: {hours * 3600 / wall_s:,.0f} times real time")
    print(f"{1e6 * cpu_s / simulated:.0f} us per request; peak memory of all processes {peak_gib:.2f} GiB")


def _print_growth(traffic: DayTraffic, seed: int) -> None:
    print(f"{'instances':>9} {'requests':>9} {'wall s':>7} {'us/request':>11} {'peak GiB':>9}")
    for num_instances in (10, 100, 1000, 4000):
        [result] = run_hours(traffic, num_instances, 1, 1, seed)
        cost_us = 1e6 * result.wall_s / result.num_simulated
        row = f"{num_instances:>9} {result.num_simulated:>9} {result.wall_s:>7.1f} {cost_us:>11.0f}"
        print(f"{row} {result.peak_bytes / 2**30:>9.2f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_argument(parser, "traces/ and lengths/")
    parser.add_argument("--workload", choices=("conversation", "coding"), default="conversation")
    parser.add_argument("--instances", type=int, default=1000, help="half prefill, half decode (%(default)s)")
    parser.add_argument("--hours", type=int, default=24, help="from the trace's first hour on (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", action="store_true", help="one hour on 10 to 4,000 instances instead")
    options = parser.parse_args(arguments)
    try:
        traffic = read_traffic(options.data, options.workload)
    except FileNotFoundError as error:
        print(f"{error.filename} does not exist; give the data folder with --data", file=sys.stderr)
        return 1
    if options.growth:
        _print_growth(traffic, options.seed)
        return 0
    began_s = time.perf_counter()
    results = run_hours(traffic, options.instances, options.hours, options.workers, options.seed)
    _print_day(results, time.perf_counter() - began_s, options.hours)
    return 0


if __name__ == "__main__":
    sys.exit(main())
