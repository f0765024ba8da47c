"""`tandem serve`: start a cluster on this machine and keep it running until it is told to stop."""

import asyncio
import importlib.util
import logging
import os
import time
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.common import ServeFile, Settings, seconds_from, state_folders
from tandem.cli.on_ray import RayAddress, serve_on_ray
from tandem.cli.prepare import free_addresses, prepare
from tandem.cli.signals import StopSignals, ignore_signals, signals_interrupt
from tandem.cli.welcome import print_welcome, what_to_wait_for
from tandem.core.clock import Clock, SystemClock
from tandem.core.log_lines import announce, configure_logging
from tandem.deploy.controller_server import serve_controller
from tandem.deploy.desired import Desired
from tandem.deploy.kept_task import cancel, keep
from tandem.deploy.log_file import folder_logs
from tandem.deploy.machine import available_memory_bytes
from tandem.deploy.plan_comparison import compare_with_plan
from tandem.deploy.process_launcher import ProcessLauncher
from tandem.deploy.progress import watch_health
from tandem.deploy.ray_cluster import new_ray_folder
from tandem.deploy.ray_launcher import RayLauncher
from tandem.deploy.run_state import RunState, StateFolders, run_state
from tandem.deploy.serving import Serving, with_token
from tandem.deploy.topology import Machine

log = logging.getLogger(__name__)

EPILOG = """\
examples:
  tandem serve                                   the built-in model, 1 prefill + 1 decode
  tandem serve examples/laptop-2p2d.yaml         a serve file
  tandem serve plan.yaml                         a plan; --set changes its serve settings
  tandem serve --launcher process                without Ray
  tandem serve plan.yaml --ray 10.0.0.1:6379     on the nodes of a running Ray cluster
  tandem serve --set router.http=127.0.0.1:0     any free port
  tandem serve --set model=~/models/Qwen3-0.6B --set decode.engine.kv_memory=2GiB

every setting, explained: examples/serve.yaml"""


class LauncherKind(StrEnum):
    """Who starts the processes."""

    RAY = "ray"
    PROCESS = "process"


def run(
    file: ServeFile = None,
    *,
    settings: Settings,
    grace: Annotated[
        float, typer.Option(parser=seconds_from(0), help="seconds that running requests may take at the end")
    ] = 10.0,
    launcher: Annotated[
        LauncherKind, typer.Option(help="who starts the processes: Ray, or this command, which is seconds faster")
    ] = LauncherKind.RAY,
    ray: RayAddress = None,
) -> int:
    """Start a router, prefill workers and decode workers on this machine, print their addresses, and keep them running:
    a worker that dies is started again. Ctrl-C (or `tandem stop`) ends everything after running requests have finished;
    a second Ctrl-C does not wait for them. `tandem up` starts a cluster that outlives the terminal.

    With --ray the workers are on all nodes of a Ray cluster that runs already, the router on this one. A plan's nodes
    are nodes of Ray's; a worker whose node dies is replaced where there is room.

    FILE is a serve file, a plan (of `tandem plan`), or an SLO file, for which a plan is made first.
    """
    for module in ("torch", *(("ray",) if launcher is LauncherKind.RAY else ())):  # other processes import them
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named '{module}'", name=module)
    if ray is not None:
        return serve_on_ray(ray, file, settings, grace)
    prepared = prepare(file, settings)
    began_s = time.monotonic()
    folders = state_folders()
    folders.make()
    config = with_token(free_addresses(prepared.config, folders.clear_ended()))
    log_folder = folders.new_log_folder(os.getpid())
    state = run_state(config, log_folder, ray_folder=str(new_ray_folder()))
    with signals_interrupt():
        try:
            folders.write(state)
            if config.log_format == "json":  # else this terminal shows what is said to it, and nothing of logs
                configure_logging("json", "controller")
            _say(f"serving {config.served_name} from {config.model}")
            desired = Desired(config, grace, plan=prepared.plan)
            return asyncio.run(_run(desired, prepared.machine, state, folders, launcher, began_s))
        except (KeyboardInterrupt, SystemExit):
            _say("interrupted")
            return 130
        finally:
            ignore_signals()
            folders.remove(state.pid)


def _say(line: str) -> None:
    announce(log, line)


def _launcher(kind: LauncherKind, desired: Desired, machine: Machine, state: RunState, clock: Clock) -> ProcessLauncher:
    folder, log_folder = Path(state.ray_folder), Path(state.log_folder)
    load_timeout_s, grace_s = desired.config.load_timeout_s, desired.grace_s
    if kind is LauncherKind.RAY:
        return RayLauncher(folder, log_folder, clock, gpus=machine.gpus, load_timeout_s=load_timeout_s, grace_s=grace_s)
    return ProcessLauncher(folder, log_folder, gpus=machine.gpus, load_timeout_s=load_timeout_s, grace_s=grace_s)


async def _run(
    desired: Desired,
    machine: Machine,
    state: RunState,
    folders: StateFolders,
    kind: LauncherKind,
    began_s: float,
) -> int:
    signals, clock = StopSignals(), SystemClock()
    launcher = _launcher(kind, desired, machine, state, clock)
    helpers: list[asyncio.Task[None]] = []
    try:
        if isinstance(launcher, RayLauncher):
            _say("  starting Ray")
        await signals.unless_stopped(launcher.start())
        if signals.stop.is_set():
            _say("interrupted")
            return 130
        if isinstance(launcher, RayLauncher):
            keep_ray = launcher.keep_ray
            helpers.append(keep("the care for Ray", lambda: keep_ray(lambda note: _say(f"  {note}")), _say))
        helpers.append(keep("the care for logs", launcher.bound_logs, _say))

        async def save(changed: Desired) -> None:
            folders.write(replace(state, controller=controller).with_addresses(changed.config.router))

        watch, logs = watch_health(clock), folder_logs(Path(state.log_folder))
        serving = Serving(
            desired,
            lambda: machine,
            launcher,
            clock,
            watch,
            save=save,
            show=_say,
            read_log=logs,
            available_memory=available_memory_bytes,
        )
        async with serve_controller(serving, desired.config) as controller:
            await save(desired)
            await _serve(serving, state, signals, began_s)
        return 0
    finally:
        await cancel(helpers)
        await launcher.close()


async def _serve(serving: Serving, state: RunState, signals: StopSignals, began_s: float) -> None:
    helpers = [
        keep("the report of events", serving.say_events, _say),
        keep("the news for processes", serving.tell_processes, _say),
    ]
    asked_to_stop = asyncio.create_task(_stop_when_asked(serving, signals), name="stop when asked")
    try:
        await signals.unless_stopped(serving.start())
        if not signals.stop.is_set():
            print_welcome(serving.config, state, time.monotonic() - began_s)
            folder = Path(state.log_folder)
            comparing = keep("the comparison with the plan", lambda: compare_with_plan(serving, folder, _say), _say)
            helpers.append(comparing)
        await signals.stop.wait()
    finally:
        if not serving.has_stopped.is_set():
            await _stop(serving, signals, serving.desired.grace_s if signals.stop.is_set() else 0.0)
        await cancel([*helpers, asked_to_stop])
        serving.say_last_events()


async def _stop_when_asked(serving: Serving, signals: StopSignals) -> None:
    """A command has ended the cluster through the controller's port."""
    await serving.has_stopped.wait()
    signals.stop.set()


async def _stop(serving: Serving, signals: StopSignals, grace_s: float) -> None:
    stopping = asyncio.create_task(_drain(serving, grace_s, is_asked=signals.stop.is_set()), name="stop")
    forced = asyncio.create_task(signals.force.wait(), name="force")
    await asyncio.wait({stopping, forced}, return_when=asyncio.FIRST_COMPLETED)
    forced.cancel()
    if not stopping.done():
        _say("stopping at once")
        stopping.cancel()
        await serving.controller.kill()
    await asyncio.gather(stopping, forced, return_exceptions=True)


async def _drain(serving: Serving, grace_s: float, *, is_asked: bool) -> None:
    if is_asked:
        waits = await what_to_wait_for(serving.config, grace_s)
        _say(f"stopping{waits} (once more to stop at once)")
    await serving.stop(grace_s)
