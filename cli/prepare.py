"""What `tandem serve` and `tandem up` do before they start anything."""

import time
from dataclasses import dataclass
from pathlib import Path

from tandem.cli.common import state_folders
from tandem.cli.output import print_line
from tandem.cli.serve_file import read_serve_file
from tandem.core.config import ServeConfig
from tandem.core.errors import ConfigError
from tandem.core.plan import Plan
from tandem.deploy.access_checks import check_access
from tandem.deploy.finding import Grade
from tandem.deploy.host_checks import check_folders
from tandem.deploy.machine import resolve_addresses, this_machine
from tandem.deploy.model_folder import check_model_folder, check_pairs
from tandem.deploy.run_state import RunState
from tandem.deploy.settings_checks import check_memory, check_settings
from tandem.deploy.topology import Machine

_PORTS_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """Settings that can work on `machine`. `plan`: what they were made of; None for a serve file."""

    config: ServeConfig
    machine: Machine
    plan: Plan | None


def prepare(
    file: Path | None, settings: list[str], machine: Machine | None = None, *, is_running: bool = False
) -> Prepared:
    """`machine`: what the processes divide; None: this machine. `is_running`: a cluster that runs gets the settings,
    whose controller compares the memory, since it knows what of it is its own. Raises ConfigError with all that would
    fail only after the model was loaded."""
    compares_memory = machine is None and not is_running
    machine = this_machine() if machine is None else machine
    to_serve = read_serve_file(file, settings, machine, compares_memory=compares_memory)
    config = to_serve.config.model_copy(update={"model": to_serve.config.model.absolute()})
    check_pairs(config, check_model_folder(config.model))
    access = [*check_access(config, file)]
    findings = [*check_settings(config, machine), *check_folders(state_folders()), *access]
    failed = [f"{finding.text}; {finding.advice}" for finding in findings if finding.grade is Grade.FAILED]
    if failed:
        raise ConfigError("\n".join(failed))
    memory = [check_memory(config, machine)] if compares_memory else []
    for finding in (*memory, *access):
        if finding.grade is not Grade.OK:
            print_line(f"warning: {finding.text}; {finding.advice}")
    return Prepared(config, machine, to_serve.plan)


def free_addresses(config: ServeConfig, ended: list[RunState]) -> ServeConfig:
    """As `resolve_addresses`, but an address of a run that has just been ended may take a moment to become free."""
    own = {config.router.http, config.router.grpc, config.router.control}
    until_s = time.monotonic()
    if any(own & {run.http, run.grpc, run.control} for run in ended):
        until_s += _PORTS_TIMEOUT_S
    while True:
        try:
            return resolve_addresses(config)
        except ConfigError:
            if time.monotonic() >= until_s:
                raise
        time.sleep(0.1)
