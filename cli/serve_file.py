"""The file that `tandem serve` is given: a serve file, a plan, or an SLO file. Their settings tell which."""

import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import tandem.cli.plan
from tandem.cli.common import read_config
from tandem.cli.output import print_line, print_rich, show_progress
from tandem.core.config import ServeConfig
from tandem.core.config_file import apply_overrides, load_config, top_level_settings
from tandem.core.errors import ConfigError
from tandem.core.plan import Plan
from tandem.core.slo_file import SloFile
from tandem.deploy.finding import Grade
from tandem.deploy.plan_serving import serve_config_of
from tandem.deploy.settings_checks import check_memory
from tandem.deploy.topology import Machine
from tandem.placement.report import formatting

_ONLY_IN_PLANS = {"groups", "verdict", "expected"}
_ONLY_IN_SLO_FILES = {"slo", "cluster", "workload"}


class FileKind(Enum):
    SERVE = "serve file"
    PLAN = "plan"
    SLO = "SLO file"


def kind_of(file: Path) -> FileKind:
    """By its settings; what cannot be read counts as a serve file."""
    settings = top_level_settings(file)
    if settings & _ONLY_IN_PLANS:
        return FileKind.PLAN
    return FileKind.SLO if settings & _ONLY_IN_SLO_FILES else FileKind.SERVE


@dataclass(frozen=True, slots=True)
class ToServe:
    """`plan`: what the configuration was made of; None for a serve file."""

    config: ServeConfig
    plan: Plan | None = None


def read_serve_file(
    file: Path | None, overrides: list[str], machine: Machine, *, compares_memory: bool = True
) -> ToServe:
    """What to run. `overrides` change serve settings, whatever kind the file is of. An SLO file is planned for here,
    which takes a while. Raises ConfigError, with `compares_memory` also for a plan for which too little is free here.
    """
    kind = FileKind.SERVE if file is None else kind_of(file)
    if file is not None and kind is FileKind.PLAN:
        plan = read_plan(file)
        return ToServe(_config_of(plan, overrides, machine, compares_memory), plan)
    if file is not None and kind is FileKind.SLO:
        plan = _plan_for(file)
        return ToServe(_config_of(plan, overrides, machine, compares_memory), plan)
    return ToServe(read_config(file, overrides))


def read_plan(file: Path) -> Plan:
    """A plan that may be run. Raises ConfigError for one that misses its targets."""
    plan = load_config(file, Plan)
    if plan.groups:
        print_line(f"the plan: {formatting.describe_plan(plan)}")
    if plan.groups and plan.verdict == "infeasible":
        raise ConfigError(
            f"{file}: this plan misses its targets ({plan.summary.rstrip('.')}); plan for others, or set its "
            "verdict to disaggregate to run it all the same"
        )
    return plan


def _plan_for(file: Path) -> Plan:
    slo = load_config(file, SloFile)
    with show_progress(sys.stderr) as progress:
        planned = tandem.cli.plan.search(slo, file, progress, 0)
    if planned.plan.verdict == "infeasible":
        raise ConfigError(f"{formatting.headline(planned)[:-1]} (to see why: tandem plan {file} --report why.html)")
    print_rich(*tandem.cli.plan.describe(planned), "")
    return planned.plan


def _config_of(plan: Plan, overrides: list[str], machine: Machine, compares_memory: bool) -> ServeConfig:
    given = [value for name, _, value in (each.partition("=") for each in overrides) if name == "model"]
    if given and not Path(plan.model).is_dir():  # a folder of the machine where the plan was made
        plan = plan.model_copy(update={"model": given[-1]})
    config = apply_overrides(serve_config_of(plan, machine), overrides)
    if config.model.resolve() == Path(plan.model).resolve() and not config.model.is_dir():
        raise ConfigError(
            f"the plan is for {plan.model}, of which only the name is known here; give its checkpoint with "
            "--set model=FOLDER"
        )
    if compares_memory and (finding := check_memory(config, machine)).grade is Grade.FAILED:
        raise ConfigError(
            f"the plan does not fit this machine ({finding.text}); set cluster.kv_memory in the SLO file and plan "
            f"again, or {finding.advice}"
        )
    return config
