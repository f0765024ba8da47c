"""`tandem ranks`: the ranks of an instance on one more host, as this process and its children."""

from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.common import GraceS, Settings
from tandem.core.config import WorkerConfig
from tandem.core.config_file import apply_overrides, load_config

EPILOG = """\
examples:
  tandem worker worker.yaml        on the first host
  tandem ranks worker.yaml         on each other host
  tandem ranks worker.yaml --set ranks.listen=$LEADER:8010      whose first host is known only when it starts

The file is that of the instance, and has a section 'ranks': where rank 0 listens, and how many ranks each host has.

The ranks join rank 0, whenever it listens, and prove that they have its cluster_token. They end with rank 0, and the
whole instance ends with any of them: whoever supervises the commands starts all of them again. After SIGTERM the ranks
go on for --grace seconds at most, until rank 0 has finished its requests."""


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="settings of the instance (YAML)")],
    *,
    grace: GraceS = 10.0,
    settings: Settings,
) -> int:
    """Run the ranks that an instance has on this host, in the foreground, where rank 0 is on another host. `tandem
    worker` with the same settings starts rank 0 and the ranks of the first host."""
    config = apply_overrides(load_config(file, WorkerConfig), settings)
    from tandem.worker.process import run_ranks  # torch takes seconds, and a mistake in the file none

    return run_ranks(config, grace)
