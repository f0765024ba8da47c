"""`tandem plan`: from an SLO file to a plan, with a report of why."""

import argparse
import dataclasses
import sys
from pathlib import Path

from tandem.cli.common import complain, say
from tandem.cli.progress import Progress
from tandem.cli.signals import signals_interrupt
from tandem.core.config_file import apply_overrides, load_config
from tandem.core.errors import ConfigError
from tandem.core.plan import Plan
from tandem.core.slo_file import SloFile
from tandem.core.text_table import text_table
from tandem.deploy.machine import this_machine
from tandem.deploy.plan_serving import serve_config_of
from tandem.deploy.ray_mapper import ray_mapper
from tandem.placement.costs.hardware import devices
from tandem.placement.costs.models import published_models
from tandem.placement.evidence import Planned
from tandem.placement.report import formatting, write_plan, write_report
from tandem.placement.report.formatting import number
from tandem.placement.search.mapper import local_mapper

HELP = "find the best way to serve a model within its SLO"
DESCRIPTION = """\
Read what to serve, on what, for whom and how well (an SLO file), try the ways to do it in the simulator, and write the
best one as a plan, which `tandem serve` runs where its instances are one device each and on this machine.

Exit status: 0 a plan that meets the SLO, 3 none does (what comes nearest is still written), 2 a mistake in the file."""
EPILOG = """\
examples:
  tandem plan slo.yaml                                   writes plan.yaml
  tandem plan slo.yaml -o chat.yaml --report chat.html   and a page that says why
  tandem plan slo.yaml --set workload.rate=20 --set search.max_tp=4
  tandem plan slo.yaml --ray 10.0.0.5:6379               with the cores of a Ray cluster
  tandem plan --devices                                  the catalogue of devices
  tandem plan --models                                   models known by name

then:
  tandem serve plan.yaml       run it
  tandem simulate plan.yaml    see it under another load
"""
NO_PLAN = 3
_NUM_REJECTED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="SLO file (YAML)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="where the plan goes (default: plan.yaml, if there is none yet)",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page (HTML) that says why")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that simulate (default: one per core)"
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="simulate on a Ray cluster instead: host:port of its head, auto for the one that this machine is part of, "
        "or local for one started for this. The plan is the same whoever simulates",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="replace a setting of the file, e.g. workload.rate=20; may be given several times",
    )
    parser.add_argument("--devices", action="store_true", help="list the devices known by name, and end")
    parser.add_argument("--models", action="store_true", help="list the models known by name, and end")


def run(args: argparse.Namespace) -> int:
    if args.devices or args.models:
        for line in (_device_lines() if args.devices else []) + (_model_lines() if args.models else []):
            say(line)
        return 0
    if args.file is None:
        raise ConfigError("name an SLO file: tandem plan slo.yaml (or --devices, or --models)")
    if args.workers < 0:
        raise ConfigError(f"--workers must be 0 or more, not {args.workers}")
    if args.workers and args.ray:
        raise ConfigError("--workers is of this machine alone; a Ray cluster says itself how many cores it has")
    slo = apply_overrides(load_config(args.file, SloFile), args.set)
    output = _output(args.output)
    _check_outputs(args.file, output, args.report)
    with Progress(sys.stderr) as progress:
        planned = search(slo, args.file, progress, args.workers, args.ray)
    _write(planned, output, args.report)
    for line in as_lines(planned):
        say(line)
    _print_next(planned.plan, output, args.report)
    return NO_PLAN if planned.plan.verdict == "infeasible" else 0


def search(slo: SloFile, file: Path, progress: Progress, workers: int = 0, ray: str | None = None) -> Planned:
    """The planner's answer, which remembers the file that it answers. `ray`: see `deploy.ray_mapper.ray_mapper`.

    Raises ConfigError, and UnavailableError where there is no such Ray.
    """
    from tandem.placement.planner import plan  # SciPy and the simulator, which the other commands have no use for

    for device in uncalibrated(slo):
        complain(
            f"note: no calibration of {device} is given, so its times are rough; for better ones: tandem profile, then "
            "name its file in cluster.nodes.calibration"
        )
    with signals_interrupt(), local_mapper(workers) if ray is None else ray_mapper(ray) as mapper:
        planned = plan(slo, progress=progress, mapper=mapper)
    answer = planned.plan.model_copy(update={"slo_file": file.resolve()})
    return dataclasses.replace(planned, plan=answer)


def uncalibrated(slo: SloFile) -> list[str]:
    """CPUs without a calibration. Those differ too much from each other for a catalogue."""
    nodes = slo.cluster.nodes
    return sorted({node.device for node in nodes if node.device.casefold() == "cpu" and node.calibration is None})


def as_lines(planned: Planned) -> list[str]:
    """The answer for a terminal: verdict, instances, what to expect, and what came nearest."""
    plan, expected = planned.plan, planned.plan.expected
    lines = [formatting.headline(planned)]
    if plan.groups:
        lines += ["", *_group_lines(plan)]
    if expected is not None:
        goodput, interval = formatting.rate(expected.goodput), formatting.interval(expected.goodput_ci)
        lines += [
            "",
            f"goodput {goodput} (95 %: {interval}), {formatting.rate(expected.goodput_per_device)} per device",
        ]
        for one in expected.classes:
            share, interval = formatting.percent(one.attainment), formatting.interval(one.attainment_ci, "percent")
            lines.append(
                f"at {formatting.rate(expected.rate)}, class {one.slo.name}: {share} meet both targets "
                f"(95 %: {interval}; required {formatting.percent(one.slo.attainment)})"
            )
        bounds = [f"{formatting.TERM_NAMES.get(bound, bound)} in {role}" for role, bound in expected.bounds.items()]
        lines += [f"a step is mostly {', '.join(bounds)}"] if bounds else []
        lines += [f"cost: {number(expected.cost_per_hour)} USD per hour"] if expected.cost_per_hour else []
    rejected = formatting.best_rejected(planned, _NUM_REJECTED)
    if rejected:
        lines += ["", "the best that were rejected:"]
        rows = [
            [
                f"  {one.description}",
                f"{formatting.rate(one.goodput_per_device)} per device" if one.goodput else "-",
                one.reason,
            ]
            for one in rejected
        ]
        lines += text_table(rows)
    return lines


def _output(output: Path | None) -> Path:
    if output is not None:
        return output
    if Path("plan.yaml").exists():
        raise ConfigError("plan.yaml exists already; name it with -o plan.yaml to replace it")
    return Path("plan.yaml")


def _check_outputs(file: Path, output: Path, report: Path | None) -> None:
    """Before the search, which takes a while. Raises ConfigError."""
    taken = {file.resolve(): "the SLO file"}
    for path, name in ((output, "the plan"), (report, "the report")):
        if path is None:
            continue
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name a file")
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"the folder {path.absolute().parent} does not exist")
        if path.resolve() in taken:
            raise ConfigError(f"{path} would be both {taken[path.resolve()]} and {name}; name another file")
        taken[path.resolve()] = name


def _write(planned: Planned, output: Path, report: Path | None) -> None:
    try:
        write_plan(planned, output)
        if report is not None:
            write_report(planned, report)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written ({error.strerror})") from error


def _print_next(plan: Plan, output: Path, report: Path | None) -> None:
    say(f"\nplan    {output}")
    if report is not None:
        say(f"report  {report}")
    if not plan.groups:
        return
    try:
        serve_config_of(plan, this_machine())
    except ConfigError as error:
        say(f"not for this machine yet: {error.message}")
        return
    folder = "" if Path(plan.model).is_dir() else " --set model=FOLDER"
    say(f"run it  tandem serve {output}{folder}")


def _group_lines(plan: Plan) -> list[str]:
    rows = [["INSTANCES", "ROLE", "SHAPE", "DEVICE", "KV TOKENS", "BATCH", "WHERE"]]
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
    return text_table(rows)


def _device_lines() -> list[str]:
    rows = [["DEVICE", "BF16 TFLOPS", "MEMORY GB", "MEMORY GB/S", "NVLINK GB/S", "NIC GBIT/S", "USD/HOUR"]]
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
    return text_table(rows)


def _model_lines() -> list[str]:
    rows = [["MODEL", "PARAMETERS", "LAYERS", "HEADS (KV)", "KV BYTES/TOKEN", "CONTEXT"]]
    for name, shape in published_models().items():
        heads = f"{shape.num_heads} ({'latent' if shape.mla else shape.num_kv_heads})"
        rows.append(
            [
                name,
                f"{number(shape.num_parameters / 1e9)} B",
                str(shape.num_layers),
                heads,
                f"{shape.kv_bytes_per_token:,.0f}",
                f"{shape.max_context_tokens:,}",
            ]
        )
    return text_table(rows)
