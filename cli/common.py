"""What several commands share: finding the running cluster, and saying things."""

import argparse
import os
import sys
from pathlib import Path

from tandem.core.config import ServeConfig
from tandem.core.config_file import apply_overrides, load_config
from tandem.core.errors import ConfigError, UnavailableError
from tandem.deploy.run_state import RunState, StateFolders

BUILT_IN_MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny-python"
DEFAULT_GRPC = "127.0.0.1:8001"


def say(text: str = "") -> None:
    """A line for a person, at once, even into a pipe."""
    print(text, flush=True)


def complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="serve file (YAML); without one: the built-in model, 1 + 1"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="replace a setting of the file, e.g. decode.instances=2; may be given several times",
    )


def read_config(file: Path | None, overrides: list[str]) -> ServeConfig:
    """The serve file, or the built-in deployment, with `--set` applied. Raises ConfigError."""
    if file is not None:
        return apply_overrides(load_config(file, ServeConfig), overrides)
    config = apply_overrides(ServeConfig(model=BUILT_IN_MODEL), overrides)
    if config.model == BUILT_IN_MODEL and not BUILT_IN_MODEL.is_dir():
        raise ConfigError(
            f"the built-in model is not at {BUILT_IN_MODEL}; it comes with the repository, not with the package: "
            "name another with --set model=FOLDER"
        )
    return config


def state_folders() -> StateFolders:
    return StateFolders.of_environment(os.environ)


def add_pid_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pid", type=int, help="which `tandem serve`, when several run (default: the only one)")


def find_run(pid: int | None) -> RunState:
    """The running `tandem serve`, that of `pid` if given. Raises UnavailableError, or ConfigError if it is unclear."""
    runs = state_folders().running()
    if pid is not None:
        runs = [run for run in runs if run.pid == pid]
        if not runs:
            raise UnavailableError(f"no `tandem serve` with pid {pid} is running for this user")
    if not runs:
        raise UnavailableError("no `tandem serve` is running for this user; start one with: tandem serve")
    if len(runs) > 1:
        which = ", ".join(f"--pid {run.pid} ({run.http})" for run in runs)
        raise ConfigError(f"several are running; say which: {which}")
    return runs[0]
