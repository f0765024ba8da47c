"""`tandem serve`: start a cluster on this machine and keep it running until it is told to stop."""

import asyncio
import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from tandem.cli.common import ServeFile, Settings, state_folders
from tandem.cli.output import print_line
from tandem.cli.serve_file import read_serve_file
from tandem.cli.signals import StopSignals, ignore_signals, signals_interrupt
from tandem.core.clock import SystemClock
from tandem.core.config import ServeConfig
from tandem.core.config_file import dump_config
from tandem.core.errors import ConfigError, TandemError
from tandem.core.plan import Plan
from tandem.deploy import checks
from tandem.deploy.access_checks import check_access
from tandem.deploy.checks import Grade
from tandem.deploy.controller import Event, Failed, Loading, Stopped, Up
from tandem.deploy.machine import resolve_addresses, this_machine
from tandem.deploy.model_folder import check_model_folder, check_pairs
from tandem.deploy.progress import watch_health
from tandem.deploy.ray_cluster import new_ray_folder
from tandem.deploy.ray_launcher import RayLauncher
from tandem.deploy.run_state import RunState, StateFolders, process_started_s
from tandem.deploy.serving import Serving, expected_transport, fetch_fleet, with_token
from tandem.deploy.topology import Machine

EPILOG = """\
examples:
  tandem serve                                   the built-in model, 1 prefill + 1 decode
  tandem serve examples/laptop-2p2d.yaml         a serve file
  tandem serve plan.yaml                         a plan; --set changes its serve settings
  tandem serve --set router.http=127.0.0.1:0     any free port
  tandem serve --set model=~/models/Qwen3-0.6B --set decode.engine.kv_memory=2GiB

every setting, explained: examples/serve.yaml"""
_PROMPT = "def read_json(path):"
_PORTS_TIMEOUT_S = 10.0
_COUNT_TIMEOUT_S = 1.0
_AGAIN_S = 1.0


def run(
    file: ServeFile = None,
    *,
    settings: Settings,
    grace: Annotated[float, typer.Option(help="seconds that running requests may take at the end")] = 10.0,
) -> int:
    """Start a router, prefill workers and decode workers on this machine under Ray, print their addresses, and keep
    them running: a worker that dies is started again. Ctrl-C (or `tandem stop`) ends everything after running requests
    have finished; a second Ctrl-C does not wait for them.

    FILE is a serve file, a plan (of `tandem plan`), or an SLO file, for which a plan is made first.
    """
    for module in ("ray", "torch"):  # other processes import them
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named '{module}'", name=module)
    machine = this_machine()
    to_serve = read_serve_file(file, settings, machine)
    check_pairs(to_serve.config, check_model_folder(to_serve.config.model))
    _check_settings(to_serve.config, machine, file)
    began_s = time.monotonic()
    folders = state_folders()
    folders.make()
    config = with_token(_free_addresses(to_serve.config, folders.clear_ended()))
    log_folder = folders.new_log_folder(os.getpid())
    config = _with_plan(config, to_serve.plan, log_folder)
    state = _run_state(config, log_folder, new_ray_folder())
    with signals_interrupt():
        try:
            folders.write(state)
            print_line(f"serving {config.served_name} from {config.model}")
            return asyncio.run(_run(config, machine, state, folders, grace, began_s, to_serve.plan))
        except (KeyboardInterrupt, SystemExit):
            print_line("interrupted")
            return 130
        finally:
            ignore_signals()
            folders.remove(state.pid)


def _check_settings(config: ServeConfig, machine: Machine, file: Path | None) -> None:
    """What would fail only after Ray and the model were loaded. Raises ConfigError with all of it."""
    access = [*check_access(config, file)]
    findings = [*checks.check_settings(config, machine), *checks.check_folders(state_folders()), *access]
    failed = [f"{finding.text}; {finding.advice}" for finding in findings if finding.grade is Grade.FAILED]
    if failed:
        raise ConfigError("\n".join(failed))
    memory = checks.check_memory(config)
    for finding in (memory, *access):
        if finding.grade is not Grade.OK:
            print_line(f"warning: {finding.text}; {finding.advice}")


def _free_addresses(config: ServeConfig, ended: list[RunState]) -> ServeConfig:
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


def _with_plan(config: ServeConfig, plan: Plan | None, folder: Path) -> ServeConfig:
    """The router reads the plan from a file: one that was made for this run has none yet."""
    if plan is None or config.router.plan is not None:
        return config
    path = folder / "plan.yaml"
    path.write_text(dump_config(plan), encoding="utf-8")
    return config.model_copy(update={"router": config.router.model_copy(update={"plan": path})})


def _run_state(config: ServeConfig, log_folder: Path, ray_folder: Path) -> RunState:
    pid = os.getpid()
    return RunState(
        pid=pid,
        process_started_s=process_started_s(pid),
        model=config.served_name,
        http=config.router.http,
        grpc=config.router.grpc,
        control=config.router.control,
        cluster_token=config.cluster_token or "",
        log_folder=str(log_folder),
        ray_folder=str(ray_folder),
        expected_transport=expected_transport(config),
        has_tls=config.router.tls is not None,
        cluster_tls=None if config.cluster_tls is None else config.cluster_tls.model_dump(mode="json"),
    )


async def _run(
    config: ServeConfig,
    machine: Machine,
    state: RunState,
    folders: StateFolders,
    grace_s: float,
    began_s: float,
    plan: Plan | None,
) -> int:
    signals, clock = StopSignals(), SystemClock()
    launcher = RayLauncher(
        Path(state.ray_folder),
        Path(state.log_folder),
        clock,
        gpus=machine.gpus,
        load_timeout_s=config.load_timeout_s,
        grace_s=grace_s,
    )
    keeping: list[asyncio.Task[None]] = []
    try:
        print_line("  starting Ray")
        await signals.unless_stopped(launcher.start())
        if signals.stop.is_set():
            print_line("interrupted")
            return 130
        keeping.append(_keep("the care for Ray", lambda: launcher.keep_ray(lambda note: print_line(f"  {note}"))))
        keeping.append(_keep("the care for logs", launcher.bound_logs))
        serving = Serving(config, machine, launcher, clock, watch_health(clock))
        await _serve(serving, state, folders, signals, grace_s, began_s, plan)
        return 0
    finally:
        await _cancel(keeping)
        await launcher.close()


async def _serve(
    serving: Serving,
    state: RunState,
    folders: StateFolders,
    signals: StopSignals,
    grace_s: float,
    began_s: float,
    plan: Plan | None,
) -> None:
    helpers = [_keep("the report of events", lambda: _print_events(serving))]
    try:
        await signals.unless_stopped(serving.start())
        if not signals.stop.is_set():
            _print_welcome(serving.config, state, time.monotonic() - began_s)
            if plan is not None:
                helpers.append(_keep("the comparison with the plan", lambda: _watch(plan, serving, state)))
        while not signals.stop.is_set():
            await signals.changed()
            if signals.take_scale():
                await signals.unless_stopped(_scale(serving, folders, grace_s))
    finally:
        await _stop(serving, signals, grace_s if signals.stop.is_set() else 0.0)
        await _cancel(helpers)
        while not serving.controller.events.empty():
            _print_event(serving.controller.events.get_nowait())


def _keep(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
    """A task that does `work`, again after an error, which is said: none of these may end unseen."""

    async def work_again() -> None:
        while True:
            try:
                return await work()
            except Exception as error:  # noqa: BLE001 - whatever it is
                with contextlib.suppress(OSError):  # the terminal may be gone
                    print_line(f"  {name} failed ({type(error).__name__}: {error}); it begins again")
            await asyncio.sleep(_AGAIN_S)

    return asyncio.create_task(work_again(), name=name)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _stop(serving: Serving, signals: StopSignals, grace_s: float) -> None:
    stopping = asyncio.create_task(_drain(serving, grace_s, is_asked=signals.stop.is_set()), name="stop")
    forced = asyncio.create_task(signals.force.wait(), name="force")
    await asyncio.wait({stopping, forced}, return_when=asyncio.FIRST_COMPLETED)
    forced.cancel()
    if not stopping.done():
        print_line("stopping at once")
        stopping.cancel()
        await serving.controller.kill()
    await asyncio.gather(stopping, forced, return_exceptions=True)


async def _drain(serving: Serving, grace_s: float, *, is_asked: bool) -> None:
    if is_asked:
        waits = await _what_to_wait_for(serving.config, grace_s)
        print_line(f"stopping{waits} (once more to stop at once)")
    await serving.stop(grace_s)


async def _what_to_wait_for(config: ServeConfig, grace_s: float) -> str:
    try:
        async with asyncio.timeout(_COUNT_TIMEOUT_S):
            fleet = await fetch_fleet(config.router.control, config.cluster_token, config.cluster_tls)
    except (TandemError, TimeoutError):
        return ""
    requests = fleet.running_requests + fleet.queued_requests
    if not requests:
        return ""
    return f": waiting up to {grace_s:g} s for {requests} running request{'s' if requests > 1 else ''}"


async def _scale(serving: Serving, folders: StateFolders, grace_s: float) -> None:
    """Do what `tandem scale` has asked for. After a failure the cluster keeps running."""
    asked = folders.take_scale_request(os.getpid())
    print_line(f"scaling to {' and '.join(f'{number} {role}' for role, number in asked.items())}")
    try:
        await serving.scale(asked, grace_s)
        print_line("scaled")
    except TandemError as error:
        print_line(f"could not scale: {error.message}")


async def _watch(plan: Plan, serving: Serving, state: RunState) -> None:
    try:
        from tandem.deploy.plan_watch import watch_plan  # SciPy, which a serve file does not need
    except ModuleNotFoundError as error:
        print_line(f"  plan: not compared with live requests; that needs `pip install 'tandem-serve[plan]'` ({error})")
        return
    await watch_plan(plan, serving.config, Path(state.log_folder), lambda note: print_line(f"  plan: {note}"))


async def _print_events(serving: Serving) -> None:
    while True:
        _print_event(await serving.controller.events.get())


def _print_event(event: Event) -> None:
    match event:
        case Loading(name):
            print_line(f"  {name} loading")
        case Up(info, load_s):
            print_line(f"  {info.name} up in {load_s:.1f} s (pid {info.pid})")
        case Failed(name, reason, retry_s, failures):
            again = f" (failure {failures} in a row)" if failures > 1 else ""
            print_line(f"  {name}: {reason}; starting it again in {retry_s:.1f} s{again}")
        case Stopped(name):
            print_line(f"  {name} stopped")


def _print_welcome(config: ServeConfig, state: RunState, took_s: float) -> None:
    body = json.dumps({"model": state.model, "prompt": _PROMPT, "max_tokens": 64, "temperature": 0})
    has_keys = config.router.api_keys is not None
    curl = (" --cacert CA" if state.has_tls else "") + (' -H "Authorization: Bearer KEY"' if has_keys else "")
    access = (", api_key='KEY'" if has_keys else "") + (", tls=ClientTls('CA')" if state.has_tls else "")
    python = (
        f"from tandem import Client{', ClientTls' if state.has_tls else ''}; "
        f"print(Client('{state.grpc}'{access}).generate("
        f"prompt='{_PROMPT}', max_tokens=64, temperature=0).text)"
    )
    page = f"\n  page  {state.url}/ui  (what the cluster does)" if config.router.ui else ""
    print_line(f"""\
ready in {took_s:.1f} s: {", ".join(f"{section.instances} {role}" for role, section in config.kinds)}
  HTTP  {state.url}/v1  (OpenAI API; /health, /metrics){page}
  gRPC  {state.grpc}
  logs  {state.log_folder}

try:
  curl {state.url}/v1/completions{curl} -H 'Content-Type: application/json' -d '{body}'
  python -c "{python}"
  tandem chat

Ctrl-C ends it.""")
