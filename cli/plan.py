"""`tandem plan`: from an SLO file to a plan, with a report of why."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.table import Table

from tandem.cli.common import Settings, writing
from tandem.cli.output import print_error, print_line, print_rich, show_progress, table
from tandem.cli.outputs import check_outputs
from tandem.cli.signals import signals_interrupt
from tandem.core.config_file import apply_overrides, load_config
from tandem.core.errors import ConfigError
from tandem.core.plan import ExpectedWindow, Plan
from tandem.core.slo_file import SloFile
from tandem.deploy.machine import this_machine
from tandem.deploy.plan_serving import serve_config_of
from tandem.deploy.ray_mapper import ray_mapper
from tandem.placement.costs.hardware import devices
from tandem.placement.costs.models import published_models
from tandem.placement.evaluation.summary import window_rows
from tandem.placement.evidence import Planned
from tandem.placement.report import formatting, write_plan, write_report
from tandem.placement.report.advice_text import advice_sentences
from tandem.placement.report.formatting import number
from tandem.placement.search.mapper import local_mapper

EPILOG = """\
examples:
  tandem plan slo.yaml                                    writes plan.yaml
  tandem plan slo.yaml -o chat.yaml --report chat.html    and a page that says why
  tandem plan slo.yaml --set workload.rate=20 --set search.max_tp=4
  tandem plan slo.yaml --ray 10.0.0.5:6379                with the cores of a Ray cluster
  tandem plan --compare a.yaml b.yaml                     two plans on the same requests
  tandem plan --devices                                   the catalogue of devices
  tandem plan --models                                    models known by name

then:
  tandem serve plan.yaml       run it
  tandem simulate plan.yaml    see it under another load"""
NO_PLAN = 3
_MOST_WORKERS = 1024
_NUM_REJECTED = 3


def run(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="SLO file (YAML)")] = None,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="the plan (default: plan.yaml, if there is none yet)")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="write a page (HTML) that says why")] = None,
    workers: Annotated[
        int, typer.Option(min=0, max=_MOST_WORKERS, help="processes that simulate (0: one per core)")
    ] = 0,
    ray: Annotated[
        str | None,
        typer.Option(
            help="simulate on a Ray cluster instead: host:port of its head, auto for the one that this machine is part "
            "of, or local for one started for this. The plan is the same on all of them"
        ),
    ] = None,
    advice: Annotated[
        bool, typer.Option("--advice/--no-advice", help="find out which single changes would help (some seconds)")
    ] = True,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="PLAN PLAN",
            help="compare two plans on the same requests instead: those of FILE, or of the first plan's SLO file",
        ),
    ] = None,
    settings: Settings,
    devices: Annotated[bool, typer.Option("--devices", help="list the devices known by name, and end")] = False,
    models: Annotated[bool, typer.Option("--models", help="list the models known by name, and end")] = False,
) -> int:
    """Read what to serve, on which machines, for which requests and how well (an SLO file), try the possible
    deployments in the simulator, and write the best one as a plan. `tandem serve` runs plans whose instances are one
    device each and on this machine. The exit status is 3 if no plan meets the SLO; the nearest plan is still
    written."""
    if devices or models:
        print_rich(*([_device_table()] if devices else []), *([_model_table()] if models else []))
        return 0
    if compare is not None:
        return _compare(file, compare, workers, settings)
    if file is None:
        raise ConfigError("name an SLO file: tandem plan slo.yaml (or --devices, or --models)")
    if workers and ray:
        raise ConfigError("--workers is for this machine alone; a Ray cluster has its own number of cores")
    slo = apply_overrides(load_config(file, SloFile), settings)
    if output is None and Path("plan.yaml").exists():
        raise ConfigError("plan.yaml exists already; name it with -o plan.yaml to replace it")
    output = output or Path("plan.yaml")
    check_outputs({"the plan": output, "the report": report}, {"the SLO file": file})
    with show_progress(sys.stderr) as progress:
        planned = search(slo, file, progress, workers, ray, advice=advice)
    with writing():
        write_plan(planned, output)
        if report is not None:
            write_report(planned, report)
    print_rich(*describe(planned))
    _print_next(planned.plan, output, report)
    return NO_PLAN if planned.plan.verdict == "infeasible" else 0


def _compare(file: Path | None, paths: tuple[Path, Path], workers: int, settings: Sequence[str]) -> int:
    # SciPy, which `tandem serve` of a plan does not need
    from tandem.cli.compare_plans import compared_plan, describe_comparison, rates_of
    from tandem.placement.plan_comparison import compare_plans

    plans = compared_plan(paths[0]), compared_plan(paths[1])
    slo = apply_overrides(plans[0].slo_file if file is None else load_config(file, SloFile), settings)
    with show_progress(sys.stderr) as progress, signals_interrupt(), local_mapper(workers) as mapper:
        progress(0.0, "simulating both plans")
        rates = compare_plans(plans, slo, rates_of(plans, slo), mapper)
    print_rich(*describe_comparison(plans, rates))
    return 0


def search(
    slo: SloFile,
    file: Path,
    progress: Callable[[float, str], None],
    workers: int = 0,
    ray: str | None = None,
    *,
    advice: bool = False,
) -> Planned:
    """The planner's answer, with the path of its SLO file. `ray`: see `deploy.ray_mapper.ray_mapper`. `advice`: see
    `placement.planner.plan`.

    Raises ConfigError, and UnavailableError where there is no such Ray.
    """
    from tandem.placement.planner import plan  # SciPy, which `tandem serve` of a plan does not need

    for device in uncalibrated(slo):
        print_error(
            f"note: the SLO file gives no calibration of {device}, so its times are rough; measure it with tandem "
            "profile and name the file in cluster.nodes.calibration"
        )
    with signals_interrupt(), local_mapper(workers) if ray is None else ray_mapper(ray) as mapper:
        planned = plan(slo, progress=progress, mapper=mapper, advice=advice)
    answer = planned.plan.model_copy(update={"slo_file": file.resolve()})
    return dataclasses.replace(planned, plan=answer)


def uncalibrated(slo: SloFile) -> list[str]:
    """CPUs without a calibration. CPUs differ too much from each other for a catalogue."""
    nodes = slo.cluster.nodes
    return sorted({node.device for node in nodes if node.device.casefold() == "cpu" and node.calibration is None})


def describe(planned: Planned) -> list[RenderableType]:
    """The answer for a terminal: verdict, instances, expected service, and the best deployments that were rejected."""
    plan, expected = planned.plan, planned.plan.expected
    parts: list[RenderableType] = [formatting.headline(planned), *advice_sentences(planned)]
    if plan.groups:
        parts += ["", _group_table(plan)]
    parts += [f"note: {note}" for note in plan.notes]
    if expected is not None:
        goodput, interval = formatting.rate(expected.goodput), formatting.interval(expected.goodput_ci)
        parts += [
            "",
            f"goodput {goodput} (95 %: {interval}), {formatting.rate(expected.goodput_per_device)} per device",
        ]
        for slo_class in expected.classes:
            share, interval = (
                formatting.percent(slo_class.attainment),
                formatting.interval(slo_class.attainment_ci, "percent"),
            )
            parts.append(
                f"at {formatting.rate(expected.rate)}, class {slo_class.slo.name}: {share} meet both targets "
                f"(95 %: {interval}; required {formatting.percent(slo_class.slo.attainment)})"
            )
        parts += _workload_parts(planned)
        bounds = [f"{formatting.TERM_NAMES.get(bound, bound)} in {role}" for role, bound in expected.bounds.items()]
        parts += [f"a step is mostly {', '.join(bounds)}"] if bounds else []
    rows = [
        [
            f"  {rejected.description}",
            f"{formatting.rate(rejected.goodput_per_device)} per device" if rejected.goodput else "-",
            rejected.reason,
        ]
        for rejected in formatting.best_rejected(planned, _NUM_REJECTED)
    ]
    return [*parts, "", "the best that were rejected:", table(["", "", ""], rows)] if rows else parts


def _workload_parts(planned: Planned) -> list[RenderableType]:
    """What the plan says about the workload: caches, windows of a trace, requests that are left out."""
    expected, workload = planned.plan.expected, planned.evidence.workload
    parts: list[RenderableType] = [f"note: {note}" for note in workload.notes]
    if expected is None:
        return parts
    if expected.cached_share is not None:
        parts.append(f"{formatting.percent(expected.cached_share)} of the prompt tokens are found in a prefix cache")
    if expected.windows:
        windows = formatting.plural(len(expected.windows), "window")
        parts.append(
            f"{windows} of the trace, with {formatting.percent(workload.simulated_share)} of its requests, were "
            f"simulated; the targets are met in {formatting.percent(_met_share(expected.windows))} of the time "
            f"(workload.cover: {formatting.percent(workload.cover)})"
        )
    if len(expected.windows) > 1:
        header, *rows = window_rows(expected.windows)
        parts += ["", table(header, [[*row] for row in rows]), ""]
    return parts


def _met_share(windows: Sequence[ExpectedWindow]) -> float:
    return min(1.0, sum(window.time_share for window in windows if window.meets))


def _print_next(plan: Plan, output: Path, report: Path | None) -> None:
    print_line(f"\nplan    {output}")
    if report is not None:
        print_line(f"report  {report}")
    if not plan.groups:
        return
    try:
        serve_config_of(plan, this_machine())
    except ConfigError as error:
        print_line(f"not for this machine yet: {error.message}")
        return
    folder = "" if Path(plan.model).is_dir() else " --set model=FOLDER"
    print_line(f"run it  tandem serve {output}{folder}")


def _group_table(plan: Plan) -> Table:
    rows = []
    for group in plan.groups:
        batch = {
            "prefill": f"{group.max_batch_tokens} tokens",
            "decode": f"{group.max_batch} sequences",
            "colocated": f"{group.max_batch} sequences + {group.max_batch_tokens} tokens, {group.policy}",
        }[group.role]
        where = " ".join("+".join(ranks) for ranks in group.devices) or "anywhere"
        where = where if len(where) <= 40 else f"{where[:37]}..."
        rows.append(
            [str(group.instances), group.role, str(group.shape), group.device, f"{group.kv_tokens:,}", batch, where]
        )
    return table(["INSTANCES", "ROLE", "SHAPE", "DEVICE", "KV TOKENS", "BATCH", "WHERE"], rows)


def _device_table() -> Table:
    rows = []
    for name, device in devices().items():
        figures = (
            device.flops / 1e12,
            device.memory_bytes / 1e9,
            device.memory_bytes_per_s / 1e9,
            device.nvlink_bytes_per_s / 1e9 or None,
            device.nic_bytes_per_s * 8 / 1e9 or None,
            device.price_per_hour,
        )
        rows.append([name, *(number(figure) if figure else "-" for figure in figures)])
    header = ["DEVICE", "BF16 TFLOPS", "MEMORY GB", "MEMORY GB/S", "NVLINK GB/S", "NIC GBIT/S", "USD/HOUR"]
    return table(header, rows)


def _model_table() -> Table:
    rows = [
        [
            name,
            f"{number(shape.num_parameters / 1e9)} B",
            str(shape.num_layers),
            f"{shape.num_heads} ({'latent' if shape.mla else shape.num_kv_heads})",
            f"{shape.kv_bytes_per_token:,.0f}",
            f"{shape.max_context_tokens:,}",
        ]
        for name, shape in published_models().items()
    ]
    return table(["MODEL", "PARAMETERS", "LAYERS", "HEADS (KV)", "KV BYTES/TOKEN", "CONTEXT"], rows)
