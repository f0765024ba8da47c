"""How much does the request path cost in addition to the engine?

router        CPU time of a router process per request, and per token and request, over HTTP SSE and over gRPC, with 1,
              8 and 32 streams at once. Its workers are scripted: they have the step times of an engine and compute
              nothing.
request_path  A router, a prefill and a decode worker on a real model. Wall time per request: the client's wait beyond
              the two engine steps of a completion of two tokens. Wall time per token and request: the decode time of
              long completions beyond the engine's steps, divided by their tokens. CPU time: of all three processes,
              without the threads that compute.
handover      Time per megabyte of KV from pool to pool, with everything that a decode worker waits for, and a plain
              memory copy of as many bytes in the same run.

Every figure is the median over rounds in which all cases take turns, with the least and the most. Wall times need a
quiet machine (its load is printed first). CPU times also hold on a busy one, though shared caches make them longer.
Nothing is pinned to a core. The last line of the output is all of it as JSON.

    python -m bench.overhead --quick               half a minute, a quick check
    python -m bench.overhead --part router         only the first table
    python -m bench.overhead --part router --against ../other-checkout
                                                   this router and that of another checkout, in turns
    python -m bench.overhead --part router --tracing
                                                   this router without traces, with a trace of one request in a
                                                   hundred, and with traces of all, in turns
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.kv_transfer.measure import measure as measure_handover
from bench.overhead.figures import OverheadSample, figures_of, figures_table
from bench.overhead.launcher import CHECKOUT, OverheadLauncher
from bench.overhead.request_path import measure_request_path
from bench.overhead.router_cost import RouterVariant, measure_routers
from bench.overhead.traces import collecting_traces, tracing_variants
from tandem.core.errors import TandemError
from tandem.core.kv_layout import KvLayout

PARTS = ("router", "request_path", "handover")
_MODEL = CHECKOUT / "models" / "tiny-python"
_HANDOVER_AIM = 0.7  # of a plain memory copy's speed
_HANDOVER_BYTES = 64 << 20
# The built-in model's blocks, and those of a model of eight billion parameters: 16 tokens, in bf16.
_HANDOVER_LAYOUTS = {"small model": (8, 4, 64), "8 B model": (32, 8, 128)}


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured. `num_tokens`: length of a long completion; `num_short`: short ones of each client in a
    round."""

    num_rounds: int
    num_tokens: int
    num_short: int


THOROUGH = Effort(num_rounds=7, num_tokens=256, num_short=6)
QUICK = Effort(num_rounds=2, num_tokens=64, num_short=2)


def _print_figures(title: str, samples: Sequence[OverheadSample], clock_with_aims: str) -> list[dict[str, Any]]:
    figures = figures_of(samples, clock_with_aims=clock_with_aims)
    print(f"\n{title}\n{figures_table(figures)}", flush=True)
    return [asdict(figure) for figure in figures]


async def _print_handover(effort: Effort) -> list[dict[str, Any]]:
    print("\nHand-over of 64 MiB, from pool to pool in two processes")
    print(f"{'blocks':>24} {'transport':>14} {'ms per MB':>10} {'plain copy':>10} {'of its speed':>12}  aim")
    rows: list[dict[str, Any]] = []
    for name, (layers, heads, head_dim) in _HANDOVER_LAYOUTS.items():
        block_bytes = KvLayout(layers, 1, heads, 16, head_dim, "bfloat16", "bench").block_bytes
        layout = KvLayout(layers, 2 * _HANDOVER_BYTES // block_bytes, heads, 16, head_dim, "bfloat16", "bench")
        for is_scattered in (False, True):
            results = await measure_handover(
                layout, _HANDOVER_BYTES // block_bytes, scattered=is_scattered, repetitions=3 * effort.num_rounds
            )
            fastest = max(results, key=lambda result: result.share_of_plain)  # a decode worker chooses this transport
            for result in results:
                blocks = f"{name}, {'scattered' if is_scattered else 'one run'}"
                verdict = ""
                if result is fastest:
                    verdict = f"{'met' if result.share_of_plain >= _HANDOVER_AIM else 'missed'} ({_HANDOVER_AIM:.0%})"
                plain_ms = result.plain_s / result.num_bytes * 1e9
                print(
                    f"{blocks:>24} {result.transport.value:>14} {result.seconds_per_megabyte * 1e3:>10.3f}"
                    f" {plain_ms:>10.3f} {result.share_of_plain:>12.0%}  {verdict}".rstrip(),
                    flush=True,
                )
                rows.append({"blocks": blocks, "share_of_plain": result.share_of_plain, **asdict(result)})
                rows[-1]["transport"] = result.transport.value
    return rows


async def measure(
    parts: Sequence[str], effort: Effort, model: Path, variants: Sequence[RouterVariant]
) -> dict[str, Any]:
    """Measure and print; returns the content of the last line. Raises MeasurementError."""
    load = os.getloadavg()
    print(f"load average {load[0]:.1f} {load[1]:.1f} {load[2]:.1f} on {os.cpu_count()} cores", flush=True)
    result: dict[str, Any] = {"load_average": load, "cores": os.cpu_count(), "effort": asdict(effort)}
    num_rounds, num_tokens, num_short = effort.num_rounds, effort.num_tokens, effort.num_short
    if "router" in parts:
        async with OverheadLauncher(model) as launcher:
            samples = await measure_routers(launcher, variants, num_rounds, num_tokens, num_short)
        result["router"] = _print_figures("Router alone (scripted workers, a token every 10 ms)", samples, "CPU")
    if "request_path" in parts:
        async with OverheadLauncher(model) as launcher:
            samples = await measure_request_path(launcher, num_rounds, num_tokens, num_short)
        result["request_path"] = _print_figures(
            f"Complete request path ({model.name}, one thread for each worker)", samples, "wall"
        )
    if "handover" in parts:
        result["handover"] = await _print_handover(effort)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rounds and short completions")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; may be given more than once")
    parser.add_argument("--model", type=Path, default=_MODEL, help="a checkpoint folder (default: the built-in model)")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="another checkout, whose router is measured in turns"
    )
    parser.add_argument("--tracing", action="store_true", help="the router with and without traces, in turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line to FILE")
    options = parser.parse_args()
    effort = QUICK if options.quick else THOROUGH
    variants = [RouterVariant()]
    if options.against is not None:
        variants = [RouterVariant("here"), RouterVariant("there", checkout=options.against)]
    try:
        with ExitStack() as stack:
            if options.tracing:
                variants = tracing_variants(stack.enter_context(collecting_traces()))
            result = asyncio.run(measure(options.part or PARTS, effort, options.model, variants))
    except TandemError as error:
        print(error, file=sys.stderr)
        return 1
    line = json.dumps(result)
    if options.json is not None:
        options.json.write_text(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
