"""What `tandem simulate` does."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tandem.cli.common import say
from tandem.cli.progress import Progress as ShownProgress
from tandem.cli.serve_file import FileKind, kind_of
from tandem.cli.version import installed_version
from tandem.core.config_file import load_config
from tandem.core.errors import ConfigError
from tandem.core.plan import Plan
from tandem.core.slo_file import SloFile, WorkloadSection
from tandem.placement.cluster import Cluster
from tandem.placement.costs.models import model_shape
from tandem.placement.costs.sources import cost_source_of
from tandem.placement.evaluation.summary import as_json, render_text, summarise
from tandem.placement.plan_deployment import deployment_of
from tandem.placement.report import RunDescription, write_simulation_report
from tandem.placement.simulator import Progress, simulate
from tandem.placement.simulator.deployment import Deployment, Failure
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.description import describe
from tandem.placement.workload.requests import RequestStream
from tandem.placement.workload.streams import make_stream
from tandem.placement.workload.traces import load_trace


def run_simulation(args: argparse.Namespace) -> int:
    """With the arguments of `cli.simulate`. Raises ConfigError."""
    if kind_of(args.plan) is FileKind.SLO:
        raise ConfigError(f"{args.plan} is an SLO file; make a plan of it first: tandem plan {args.plan} -o plan.yaml")
    plan = load_config(args.plan, Plan)
    slo_path = args.slo or plan.slo_file
    if slo_path is None:
        raise ConfigError(f"{args.plan} names no SLO file, so there are no workload and no targets; give --slo FILE")
    slo = load_config(slo_path, SloFile)
    if args.trace is not None:
        slo = slo.model_copy(update={"workload": WorkloadSection(trace=args.trace)})
    seed = slo.search.seed if args.seed is None else args.seed
    count = args.requests or slo.search.requests
    requests = make_stream(slo.workload, slo.slo, count=count, rate=_rate(args, plan, slo, count), seed=seed)
    result = _simulate(_deployment(plan, slo, args.fail), requests)
    summary = summarise(result, slo.slo)
    say(render_text(summary))
    judged_from_s = float(requests.arrival_s[min(summary.evaluation.warm_up, len(requests) - 1)])
    for failure in args.fail:
        if failure.until_s <= judged_from_s:
            say(
                f"note: {failure.instance_id} was back before the requests that are judged came, from second "
                f"{judged_from_s:.0f} on; lose it later, or ask for more --requests"
            )
        elif failure.at_s > float(requests.arrival_s[0]) + summary.duration_s:
            say(f"note: {failure.instance_id} was to be lost at {failure.at_s:g} s, after the end of the run")
    if args.json is not None:
        with _written(args.json):
            args.json.write_text(json.dumps(as_json(summary), indent=2) + "\n", encoding="utf-8")
    if args.report is not None:
        description = RunDescription(
            title=f"Simulation of {args.plan.name}",
            workload=f"{describe(slo.workload)}, {requests.rate:.3g} req/s",
            version=installed_version("tandem-serve"),
            seed=seed,
            inputs=tuple((path.name, path.read_text("utf-8")) for path in (args.plan, slo_path)),
        )
        with _written(args.report):
            write_simulation_report(result, slo.slo, description, args.report)
    return 0


def _rate(args: argparse.Namespace, plan: Plan, slo: SloFile, count: int) -> float:
    """Asked for, or the trace's own, or what the plan was made for, or what the SLO file says."""
    workload = slo.workload
    if args.rate is not None:
        return float(args.rate)
    if workload.trace is not None:
        rate = load_trace(workload.trace).head(count).rate
        if rate == 0:
            raise ConfigError(f"{workload.trace}: all requests arrive at once; give --rate R")
        return rate
    if plan.expected is not None:
        return plan.expected.rate
    if workload.rate != "max":
        return workload.rate
    raise ConfigError(f"neither {args.plan} nor its SLO file says how many requests come per second; give --rate R")


def _deployment(plan: Plan, slo: SloFile, failures: Sequence[Failure]) -> Deployment:
    model = model_shape(plan.model)
    return deployment_of(
        plan, cost_source_of(slo, model), Cluster.of(slo.cluster), model, classes=slo.slo, failures=failures
    )


def _simulate(deployment: Deployment, requests: RequestStream) -> SimulationResult:
    with ShownProgress(sys.stderr) as show:

        def advance(progress: Progress) -> bool:
            ended = progress.finished + progress.refused
            show(ended / len(requests), f"{ended:,} of {len(requests):,} requests")
            return False

        return simulate(deployment, requests, stop_when=advance)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror})") from error
