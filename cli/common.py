"""Options and look-ups that several commands share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from tandem.core.config import ServeConfig
from tandem.core.config_file import apply_overrides, load_config
from tandem.core.errors import ConfigError, UnavailableError
from tandem.core.secret_source import read_secret
from tandem.deploy.run_state import RunState, StateFolders

_API_KEY = "TANDEM_API_KEY"

BUILT_IN_MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny-python"

ServeFile = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", help="serve file (YAML); without one: the built-in model, 1 prefill + 1 decode"),
]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        default_factory=list,
        show_default=False,
        help="replace a setting of the file (SETTING=VALUE); may be given several times",
    ),
]
GraceS = Annotated[float, typer.Option(min=0, help="seconds that running requests may take to end after SIGTERM")]
ApiKeyFile = Annotated[
    Path | None, typer.Option(help=f"file with an API key of the router (default: the variable {_API_KEY})")
]
Ca = Annotated[Path | None, typer.Option(help="PEM file of authorities, for a router with TLS (default: public ones)")]
ClientCertificate = Annotated[Path | None, typer.Option(help="PEM file to show to a router that asks for it")]
ClientKey = Annotated[Path | None, typer.Option(help="PEM file with the key of --certificate")]
Pid = Annotated[int | None, typer.Option(help="which `tandem serve`, when several run (default: the only one)")]


def read_config(file: Path | None, settings: list[str]) -> ServeConfig:
    """The serve file, or the built-in deployment, with `--set` applied. Raises ConfigError."""
    config = ServeConfig(model=BUILT_IN_MODEL) if file is None else load_config(file, ServeConfig)
    return apply_overrides(config, settings)


def read_api_key(file: Path | None) -> str | None:
    """From the file, or else from the environment; never from an option, which all processes could see. Raises
    ConfigError."""
    if file is not None:
        return read_secret(f"file:{file}")
    return os.environ.get(_API_KEY, "").strip() or None


@contextmanager
def writing() -> Iterator[None]:
    """A file that cannot be written is a ConfigError, which names it."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written ({error.strerror})") from error


def state_folders() -> StateFolders:
    return StateFolders.of_environment(os.environ)


def find_run(pid: int | None) -> RunState:
    """The running `tandem serve`, that of `pid` if given. Raises UnavailableError, or ConfigError if several run."""
    runs = state_folders().running()
    if pid is not None:
        runs = [run for run in runs if run.pid == pid]
        if not runs:
            raise UnavailableError(f"no `tandem serve` with pid {pid} is running for this user")
    if not runs:
        raise UnavailableError("no `tandem serve` is running for this user; start one with: tandem serve")
    if len(runs) > 1:
        which = ", ".join(f"--pid {run.pid} ({run.http})" for run in runs)
        raise ConfigError(f"several `tandem serve` are running; name one: {which}")
    return runs[0]
