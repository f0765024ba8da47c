"""`tandem controller`: the controller of a cluster on Kubernetes, as this process."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.common import GraceS, Settings
from tandem.core.config import ServeConfig
from tandem.core.config_file import apply_overrides, load_config

EPILOG = """\
examples:
  tandem controller settings.yaml --pods pods.yaml

The Helm chart runs it with workers.kind Controller, and writes both files (docs/kubernetes.md). Other commands (status,
scale, drain, role, apply, logs) run in its pod:
  kubectl exec deploy/chat-controller -- tandem status"""


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="serve file (YAML)")],
    *,
    pods: Annotated[Path, typer.Option(help="the pods of each group of instances, as the chart writes them (YAML)")],
    grace: GraceS = 10.0,
    settings: Settings,
) -> int:
    """Keep the instances of a cluster running as pods of Kubernetes, in the foreground. The pods outlive this process:
    the next one takes them back. Routers run elsewhere and announce themselves here."""
    from tandem.deploy.kubernetes.controller import run_controller
    from tandem.deploy.kubernetes.instance_pod import PodSettings

    config = apply_overrides(load_config(file, ServeConfig), settings)
    asyncio.run(run_controller(config, load_config(pods, PodSettings), grace))
    return 0
