"""`tandem simulate`: what a plan would do, without the devices."""

import argparse
import math
from pathlib import Path

from tandem.placement.simulator.deployment import Failure

HELP = "run a plan on a simulated cluster"
DESCRIPTION = """\
Run a plan on a virtual clock: the schedulers and the routing of the real cluster, a cost model instead of devices.
Prints what share of the requests keeps its targets, latencies, and where the time goes. The workload, the targets and
the cluster are those of the plan's SLO file."""
EPILOG = """\
examples:
  tandem plan examples/slo-h100.yaml -o plan.yaml       make a plan
  tandem simulate plan.yaml                             at the rate that it was made for
  tandem simulate plan.yaml --rate 30                   and with more traffic?
  tandem simulate plan.yaml --trace yesterday.csv       and with yesterday's requests? Columns: arrival_s,
                                                        prompt_tokens, output_tokens, and slo_class if you like
  tandem simulate plan.yaml --fail decode-0@60-90       and when an instance is gone from second 60 to second 90?
  tandem simulate plan.yaml --report run.html --json run.json

Numbers are of the steady state: requests from while the cluster filled and emptied are left out, and a run in which
queues grow from end to end is called overloaded whatever it kept. The same seed gives the same run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN", help="plan file (YAML), from `tandem plan` or by hand")
    parser.add_argument("--slo", type=Path, metavar="FILE", help="SLO file (default: the one that the plan names)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="requests of this trace (CSV or JSON lines, .gz)")
    parser.add_argument(
        "--rate", type=_rate, help="requests per second (default: the plan's; of a trace, the trace's own)"
    )
    parser.add_argument(
        "--requests", type=_count, metavar="N", help="how many (default: the SLO file's search.requests)"
    )
    parser.add_argument("--seed", type=int, help="of arrivals and lengths (default: the SLO file's)")
    parser.add_argument(
        "--fail",
        action="append",
        default=[],
        type=_failure,
        metavar="INSTANCE@T[-U]",
        help="lose an instance at second T, and have it again at U; may be given several times",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page with figures (HTML)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers for programs")


def run(args: argparse.Namespace) -> int:
    from tandem.cli.simulation import run_simulation  # SciPy and the simulator, which other commands have no use for

    return run_simulation(args)


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _failure(text: str) -> Failure:
    instance_id, _, times = text.rpartition("@")
    start, dash, end = times.partition("-")
    try:
        at_s, until_s = float(start), float(end) if dash else math.inf
    except ValueError:
        at_s = until_s = math.nan
    if not instance_id or not 0 <= at_s < until_s:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form decode-0@60 or decode-0@60-90")
    return Failure(instance_id, at_s, until_s)
