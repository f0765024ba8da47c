"""`tandem simulate`: what a plan would do, without the devices."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.common import writing
from tandem.cli.output import print_error, print_line, show_progress
from tandem.cli.outputs import check_outputs
from tandem.cli.serve_file import FileKind, kind_of
from tandem.cli.version import installed_version
from tandem.core.config_file import load_config, read_text
from tandem.core.errors import ConfigError
from tandem.core.plan import Plan
from tandem.core.slo_file import MAX_REQUESTS, SloFile, WorkloadSection
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
from tandem.placement.workload.streams import generated_requests, trace_requests
from tandem.placement.workload.windows import Window, windowed

EPILOG = """\
examples:
  tandem plan examples/slo-h100.yaml -o plan.yaml    make a plan
  tandem simulate plan.yaml                          at the rate that it was made for
  tandem simulate plan.yaml --rate 30                with more traffic
  tandem simulate plan.yaml --trace yesterday.csv    with the requests of a trace
  tandem simulate plan.yaml --fail decode-0@60-90    without an instance for 30 s
  tandem simulate plan.yaml --report run.html --json run.json

A trace has the columns arrival_s, prompt_tokens, output_tokens and, optionally, slo_class.

A trace is simulated whole, and judged in windows of time, of which the worst decides (or workload.cover of the SLO
file). Requests that the server would refuse are counted and left out.

Numbers are of the steady state: requests that come while the cluster fills and empties are left out. A run in which
queues grow from end to end is called overloaded, however many requests meet their targets. The same seed gives the
same run."""


def _failure(text: str) -> Failure:
    instance_id, _, times = text.rpartition("@")
    start, dash, end = times.partition("-")
    try:
        at_s, until_s = float(start), float(end) if dash else math.inf
    except ValueError:
        at_s = until_s = math.nan
    if not instance_id or not 0 <= at_s < until_s:
        raise typer.BadParameter(f"'{text}' is not of the form decode-0@60 or decode-0@60-90")
    return Failure(instance_id, at_s, until_s)


def run(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="plan (YAML), from `tandem plan` or by hand")],
    *,
    slo_path: Annotated[Path | None, typer.Option("--slo", help="SLO file (default: the one in the plan)")] = None,
    trace: Annotated[Path | None, typer.Option(help="requests of this trace (CSV or JSON lines, .gz)")] = None,
    rate: Annotated[
        float | None, typer.Option(help="requests per second (default: the plan's, or with --trace the trace's)")
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_REQUESTS,
            help="number of requests (default: the plan's, or search.requests of the SLO file; all of a trace)",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="of arrivals and lengths (default: the SLO file's)")] = None,
    failures: Annotated[
        list[Failure],
        typer.Option(
            "--fail",
            parser=_failure,
            default_factory=list,
            show_default=False,
            help="INSTANCE@T or INSTANCE@T-U: the instance is lost at second T, and back at U; may be given several "
            "times",
        ),
    ],
    report: Annotated[Path | None, typer.Option(help="write a page with figures (HTML)")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the numbers for programs")] = None,
) -> int:
    """Run a plan on a virtual clock: the schedulers and the routing of the real cluster, with a cost model instead of
    devices. Prints the share of requests that meet their targets, latencies, and the time in each stage. The workload,
    the targets and the cluster are those of the plan's SLO file."""
    if rate is not None and not 0 < rate < math.inf:
        raise ConfigError(f"--rate must be more than 0, not {rate:g}")
    if kind_of(plan_path) is FileKind.SLO:
        raise ConfigError(f"{plan_path} is an SLO file; make a plan of it first: tandem plan {plan_path} -o plan.yaml")
    plan = load_config(plan_path, Plan)
    slo_path = slo_path or plan.slo_file
    if slo_path is None:
        raise ConfigError(f"{plan_path} names no SLO file, so there are no workload and no targets; give --slo FILE")
    slo = load_config(slo_path, SloFile)
    inputs = tuple((path.name, read_text(path)) for path in (plan_path, slo_path)) if report is not None else ()
    check_outputs(
        {"the report": report, "the numbers": json_path},
        {"the plan": plan_path, "the SLO file": slo_path, "the trace": trace},
    )
    if trace is not None:
        slo = slo.model_copy(update={"workload": WorkloadSection(trace=trace)})
    seed = slo.search.seed if seed is None else seed
    model, cluster = model_shape(plan.model, plan.precision), Cluster.of(slo.cluster)
    windows: tuple[Window, ...] = ()
    if slo.workload.trace is not None:
        whole = trace_requests(slo.workload, slo.slo, seed=seed, max_context_tokens=model.max_context_tokens)
        divided = windowed(whole.requests.head(requests or len(whole.requests)), slo.search.requests, whole=True)
        stream, windows = divided.stream, divided.windows
    else:
        count = requests or _default_count(plan, slo)
        whole = generated_requests(
            slo.workload, slo.slo, count=count, rate=1.0, seed=seed, max_context_tokens=model.max_context_tokens
        )
        stream = whole.requests
    for note in whole.notes:
        print_error(f"note: {note}")
    rate = rate or _default_rate(plan_path, plan, slo, stream, is_own=trace is None)
    stream = stream.scaled_to(rate)
    source = cost_source_of(slo, model)
    result = _simulate(deployment_of(plan, source, cluster, model, failures=failures), stream)
    summary = summarise(result, slo.slo, windows, slo.workload.cover)
    print_line(render_text(summary))
    judged_from_s = float(stream.arrival_s[min(summary.evaluation.warm_up, len(stream) - 1)])
    for failure in failures:
        if failure.until_s <= judged_from_s:
            print_line(
                f"note: {failure.instance_id} is back before the first request that is judged, at second "
                f"{judged_from_s:.0f}; lose it later, or ask for more --requests"
            )
        elif failure.at_s > float(stream.arrival_s[0]) + summary.duration_s:
            print_line(f"note: {failure.instance_id} would be lost at {failure.at_s:g} s, after the end of the run")
    if json_path is not None:
        with writing():
            json_path.write_text(json.dumps(as_json(summary), indent=2) + "\n", encoding="utf-8")
    if report is not None:
        description = RunDescription(
            title=f"Simulation of {plan_path.name}",
            workload=f"{describe(slo.workload)}, {stream.rate:.3g} req/s",
            version=installed_version("tandem-serve"),
            seed=seed,
            inputs=inputs,
        )
        with writing():
            write_simulation_report(result, slo.slo, description, report)
    return 0


def _default_count(plan: Plan, slo: SloFile) -> int:
    """That with which the plan was evaluated, so that the same rate gives the same run."""
    if plan.expected is not None and plan.expected.requests is not None:
        return plan.expected.requests
    return slo.search.requests


def _default_rate(plan_path: Path, plan: Plan, slo: SloFile, stream: RequestStream, *, is_own: bool) -> float:
    """That which the plan was made for, or the trace's own, or that of the SLO file. `is_own`: the workload is that of
    the plan."""
    workload = slo.workload
    if plan.expected is not None and is_own:
        return plan.expected.rate
    if workload.trace is not None:
        if stream.rate == 0:
            raise ConfigError(f"{workload.trace}: all requests arrive at once; give --rate R")
        return stream.rate
    if workload.rate != "max":
        return workload.rate
    raise ConfigError(f"neither {plan_path} nor its SLO file says how many requests come per second; give --rate R")


def _simulate(deployment: Deployment, requests: RequestStream) -> SimulationResult:
    with show_progress(sys.stderr) as show:

        def advance(progress: Progress) -> bool:
            ended = progress.finished + progress.refused
            show(ended / len(requests), f"{ended:,} of {len(requests):,} requests")
            return False

        return simulate(deployment, requests, stop_when=advance)
