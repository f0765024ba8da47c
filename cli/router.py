"""`tandem router`: one router as this process, for containers and supervisors."""

from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.common import GraceS, Settings
from tandem.core.config import RouterConfig
from tandem.core.config_file import apply_overrides, load_config
from tandem.router.process import run_router

EPILOG = """\
examples:
  tandem router examples/router.yaml
  tandem router router.yaml --grace 60 --set router.http=0.0.0.0:8000 --set router.api_keys=file:keys.yaml

The file holds: model, cluster_token, and a section 'router' as in a serve file.

SIGTERM drains: /readyz is 503, new requests are refused, running ones may take --grace seconds, then the process ends
with status 0. Probes: GET /readyz (200 if requests can be served) and GET /livez (200 as long as the router runs)."""


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="settings of the router (YAML)")],
    *,
    grace: GraceS = 10.0,
    settings: Settings,
) -> int:
    """Run one router in the foreground. Instances started with `tandem worker` report to its control address.
    `tandem serve` starts routers and instances together; this command is for containers and for supervisors of your
    own."""
    run_router(apply_overrides(load_config(file, RouterConfig), settings), grace)
    return 0
