"""The option `--router` of commands that look at a router which a person has started."""

from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.common import find_run
from tandem.core.address import split_address
from tandem.core.config import RouterConfig, with_secrets
from tandem.core.config_file import load_config
from tandem.core.errors import ConfigError
from tandem.deploy.run_state import RunState

RouterFile = Annotated[
    Path | None,
    typer.Option("--router", help="settings file of a router started by hand (default: the cluster of this user)"),
]


def find_router(pid: int | None, file: Path | None) -> RunState:
    """As `find_run`. The cluster of a router started by hand has no controller, so its pid is 0."""
    if file is None:
        return find_run(pid)
    config = with_secrets(load_config(file, RouterConfig))
    section = config.router
    if split_address(section.control)[1] == 0:
        raise ConfigError(f"{file} leaves the port of router.control to the system; name one, to find the router there")
    return RunState(
        pid=0,
        process_started_s=0.0,
        model=config.served_name,
        http=section.http,
        grpc=section.grpc,
        control=section.control,
        cluster_token=config.cluster_token or "",
        log_folder="",
        ray_folder="",
        has_tls=section.tls is not None,
        cluster_tls=None if config.cluster_tls is None else config.cluster_tls.model_dump(mode="json"),
    )
