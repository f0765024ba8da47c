"""`tandem worker`: one instance as this process, for containers and supervisors."""

from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.common import GraceS, Settings
from tandem.core.config import WorkerConfig
from tandem.core.config_file import apply_overrides, load_config

EPILOG = """\
examples:
  tandem worker examples/prefill_worker.yaml
  tandem worker worker.yaml --grace 60 --set listen=10.1.2.3:8003

The file holds: model, role, listen, routers (control addresses to report to), cluster_token, and a section 'instance'
with the settings that a role's section of a serve file has.

SIGTERM drains: the routers send nothing new, running requests may take --grace seconds, then the process ends with
status 0. Probes: the health service of gRPC at `listen`, for the service '' (takes work) and 'liveness' (runs)."""


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="settings of the instance (YAML)")],
    *,
    grace: GraceS = 10.0,
    settings: Settings,
) -> int:
    """Run one instance (prefill, decode or colocated) in the foreground. It reports to its routers, which may start
    later, move, or be several behind one name in DNS. `tandem serve` starts routers and instances together; this
    command is for containers and for supervisors of your own."""
    config = apply_overrides(load_config(file, WorkerConfig), settings)
    from tandem.worker.process import run_worker  # torch takes seconds, and a mistake in the file none

    return run_worker(config, grace)
