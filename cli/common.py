"""Options, look-ups and calls that several commands share."""

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from tandem.cli.output import print_error, print_line
from tandem.core.cluster_status import ClusterChange
from tandem.core.config import ServeConfig
from tandem.core.config_file import apply_overrides, load_config
from tandem.core.errors import ConfigError, TandemError, UnavailableError
from tandem.core.printable import is_header_text
from tandem.core.secret_source import read_secret
from tandem.deploy.desired import Desired
from tandem.deploy.run_state import RunState, StateFolders, read_run
from tandem.wire.channels import open_channel
from tandem.wire.controller import ControllerClient

Result = TypeVar("Result")

_LAST_LINES_S = 0.2  # those that are on their way when a call returns

_API_KEY = "TANDEM_API_KEY"
_MOST_SECONDS = 1e9

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


def seconds_from(least: float) -> Callable[[str], float]:
    """A parser of times on the command line: neither NaN nor more than the clocks of a process can count."""

    def seconds(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= _MOST_SECONDS:
            raise typer.BadParameter(f"'{text}' is not a number of seconds from {least:g} to {_MOST_SECONDS:g}")
        return value

    return seconds


GraceS = Annotated[
    float, typer.Option(parser=seconds_from(0), help="seconds that running requests may take to end after SIGTERM")
]
ApiKeyFile = Annotated[
    Path | None, typer.Option(help=f"file with an API key of the router (default: the variable {_API_KEY})")
]
Ca = Annotated[Path | None, typer.Option(help="PEM file of authorities, for a router with TLS (default: public ones)")]
ClientCertificate = Annotated[Path | None, typer.Option(help="PEM file to show to a router that asks for it")]
ClientKey = Annotated[Path | None, typer.Option(help="PEM file with the key of --certificate")]
Pid = Annotated[int | None, typer.Option(help="pid of the controller, when several run (default: the only one)")]
Name = Annotated[str, typer.Option(help="name of the cluster, where there are several")]
Grace = Annotated[
    float | None,
    typer.Option(
        parser=seconds_from(0), help="seconds that requests of a process that stops may take; default: the cluster's"
    ),
]
Timeout = Annotated[float, typer.Option(parser=seconds_from(0), help="how long to wait for processes, in seconds")]
Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="return when the processes are ready, or once the controller runs")
]
Process = Annotated[str, typer.Argument(help="name of a process, such as decode-0, or the id of an instance")]


def read_config(file: Path | None, settings: list[str]) -> ServeConfig:
    """The serve file, or the built-in deployment, with `--set` applied. Raises ConfigError."""
    config = ServeConfig(model=BUILT_IN_MODEL) if file is None else load_config(file, ServeConfig)
    return apply_overrides(config, settings)


def read_api_key(file: Path | None) -> str | None:
    """From the file, or else from the environment; never from an option, which all processes could see. Raises
    ConfigError."""
    key = os.environ.get(_API_KEY, "").strip() if file is None else read_secret(f"file:{file}")
    if not is_header_text(key):
        raise ConfigError(f"{f'the variable {_API_KEY}' if file is None else file} holds no API key, but other text")
    return key or None


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
    """The running cluster, that of the controller `pid` if given. Raises UnavailableError, or ConfigError if several
    run."""
    runs = state_folders().running()
    if pid is not None:
        runs = [run for run in runs if run.pid == pid]
        if not runs:
            raise UnavailableError(f"no cluster with the controller {pid} is running for this user")
    if not runs:
        clusters = state_folders().clusters
        for path in clusters.glob("*/run.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):  # of another version, or just deleted
                if (lost := read_run(path)).ray:
                    raise UnavailableError(lost_controller(lost))
        left = [path.parent.name for path in clusters.glob("*/desired.json")]
        if left:
            raise UnavailableError(
                f"the controller of the cluster '{left[0]}' does not run; start it again with: tandem up --name "
                f"{left[0]}"
            )
        raise UnavailableError("no cluster is running for this user; start one with: tandem serve, or tandem up")
    if len(runs) > 1:
        which = ", ".join(f"--pid {run.pid} ({run.cluster or run.http})" for run in runs)
        raise ConfigError(f"several clusters are running; name one: {which}")
    return runs[0]


def lost_controller(run: RunState) -> str:
    """What to say of a cluster on Ray whose controller is not where it was."""
    return (
        f"the controller of the cluster '{run.cluster}' does not answer at {run.controller}; find it again with: "
        f"tandem up --name {run.cluster} --ray {run.ray}"
    )


def controller_address(run: RunState) -> str:
    """Raises UnavailableError while it does not listen yet."""
    if not run.controller:
        raise UnavailableError(f"the controller (pid {run.pid}) is still starting; try again in a moment")
    return run.controller


def ask_controller(
    run: RunState,
    ask: Callable[[ControllerClient], Awaitable[Result]],
    timeout_s: float = 900.0,
    *,
    num_past: int | None = 0,
) -> Result:
    """What `ask` returns. Until then, print what happens in the cluster, from `num_past` lines ago; with None, nothing.
    Raises the controller's error, or UnavailableError where it does not answer."""

    address = controller_address(run)

    async def show(lines: AsyncIterator[str]) -> None:
        async for line in lines:
            print_line(line)

    async def ask_and_show() -> Result:
        async with open_channel(address, run.cluster_token, run.tls) as channel:
            client = ControllerClient(channel, timeout_s)
            showing = None
            if num_past is not None:
                showing = asyncio.create_task(show(await client.watch(run.cluster_token, num_past)))
            try:
                return await ask(client)
            finally:
                if showing is not None:
                    await asyncio.wait((showing,), timeout=_LAST_LINES_S)
                    showing.cancel()
                    await asyncio.gather(showing, return_exceptions=True)

    with the_cluster_goes_on():
        return asyncio.run(ask_and_show())


async def bring_about(client: ControllerClient, desired: Desired, *, is_new: bool) -> None:
    """What should run, in a cluster whose controller has just been started. A new cluster that cannot be started is
    ended. Raises the controller's error."""
    plan_json = "" if desired.plan is None else desired.plan.model_dump_json()
    try:
        await client.apply(desired.config.model_dump_json(), None, plan_json)
    except TandemError:
        if is_new:
            print_line("it could not be started; ending it")
            with contextlib.suppress(UnavailableError):  # somebody else is ending it
                await client.stop(0.0)
        raise


@contextmanager
def the_cluster_goes_on() -> Iterator[None]:
    """What has been begun in a cluster does not end with the command that asked for it, and an interrupt says so."""
    try:
        yield
    except KeyboardInterrupt:
        print_error("interrupted; the cluster goes on with what it does: tandem status shows it")
        raise


def print_change(change: ClusterChange) -> None:
    parts = (("started", change.started), ("stopped", change.stopped), ("replaced", change.replaced))
    changes = [f"{what} {', '.join(names)}" for what, names in parts if names]
    print_line("; ".join(changes) or "no process had to start or to stop")
