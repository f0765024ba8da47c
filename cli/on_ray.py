"""`tandem serve --ray` and `tandem up --ray`: a cluster on the nodes of a Ray cluster that others have started."""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from tandem.cli.common import ask_controller, bring_about, state_folders
from tandem.cli.prepare import prepare
from tandem.cli.signals import StopSignals, ignore_signals, signals_interrupt
from tandem.cli.welcome import print_background_welcome, print_welcome, what_to_wait_for
from tandem.core.address import is_loopback
from tandem.core.errors import ConfigError, TandemError, UnavailableError
from tandem.core.log_lines import announce, configure_logging
from tandem.deploy.cluster_folder import ClusterFolder
from tandem.deploy.desired import Desired
from tandem.deploy.node_placement import machine_of
from tandem.deploy.ray_cluster import RAY_CLIENT, RUNNING, join_ray
from tandem.deploy.ray_controller import ask_where, find_controller, start_controller
from tandem.deploy.ray_node_launcher import NAMESPACE, living_nodes
from tandem.deploy.run_state import RunState, run_state
from tandem.deploy.serving import with_token
from tandem.wire.channels import open_channel
from tandem.wire.controller import ControllerClient

log = logging.getLogger(__name__)

RayAddress = Annotated[
    str | None,
    typer.Option("--ray", help="join the Ray cluster with this head (HOST:PORT), or that of this host (auto)"),
]
CONTROLLER_START_S = 120.0


def join(address: str) -> ModuleType:
    """Raises ConfigError, UnavailableError."""
    if address.startswith(RAY_CLIENT) or address == "local":
        raise ConfigError(
            f"--ray {address}: give host:port of a Ray cluster's head, or auto, on a host of that cluster"
        )
    ray = join_ray(address, "leave --ray out", NAMESPACE)
    is_open = os.environ.get("RAY_AUTH_MODE") != "token"
    if is_open and (address == RUNNING or not is_loopback(address)):
        _say(
            "warning: whoever reaches the ports of this Ray cluster can run programs on its hosts; start its nodes "
            "with RAY_AUTH_MODE=token"
        )
    return ray


def serve_on_ray(address: str, file: Path | None, settings: list[str], grace_s: float) -> int:
    """As `tandem serve`. The controller is an actor of Ray that ends with this process."""
    began_s = time.monotonic()
    folders = state_folders()
    folders.make()
    with signals_interrupt():
        ray = join(address)
        try:
            prepared = prepare(file, settings, machine_of(living_nodes(ray)))
            log_folder = folders.new_log_folder(os.getpid())
            config = with_token(prepared.config)
            if config.log_format == "json":
                configure_logging("json", "controller")
            _say(f"serving {config.served_name} from {config.model}")
            desired = Desired(config, grace_s, plan=prepared.plan)
            cluster = f"serve-{os.getpid()}-{secrets.token_hex(4)}"
            actor = start_controller(ray, cluster, log_folder.name, desired, outlives=False)
            controller, desired = ask_where(ray, actor, CONTROLLER_START_S)
            _warn_unencrypted(desired)
            state = replace(
                run_state(desired.config, log_folder, controller=controller),
                expected_transport=None,  # it depends on who is on which host
                is_here=False,
            )
            folders.write(state)
            return asyncio.run(_serve(state, desired, began_s))
        except (KeyboardInterrupt, SystemExit):
            _say("interrupted")
            return 130
        finally:
            ignore_signals()
            folders.remove(os.getpid())
            ray.shutdown()  # ends the controller, and all processes with it, if they have not ended


def up_on_ray(
    address: str, file: Path | None, settings: list[str], name: str, grace_s: float, timeout_s: float | None
) -> int:
    """As `tandem up`; without `timeout_s` it does not wait for the processes. The controller is a detached actor of
    Ray; the files here say only where it is."""
    folders = state_folders()
    folder = ClusterFolder.of_name(folders.clusters, name)
    if (live := folder.live_run()) is not None:
        where = f"on the Ray cluster {live.ray}" if live.ray else f"pid {live.pid}"
        raise ConfigError(f"the cluster '{name}' runs already ({where}); change it with: tandem apply FILE")
    folder.make()
    logs = folders.logs / f"ray-{name}"
    ray = join(address)
    try:
        actor = find_controller(ray, name)
        is_new = actor is None
        if is_new:
            prepared = prepare(file, settings, machine_of(living_nodes(ray)))
            wanted = Desired(with_token(prepared.config), grace_s, plan=prepared.plan)
            actor = start_controller(ray, name, logs.name, wanted, outlives=True)
        elif file is not None or settings:
            raise ConfigError(
                f"the Ray cluster has a cluster '{name}'; find its controller with `tandem up --ray {address}` without "
                "a file, and change the cluster with `tandem apply FILE`"
            )
        try:
            controller, desired = ask_where(ray, actor, CONTROLLER_START_S)
        except TandemError:
            if is_new:
                ray.kill(actor, no_restart=True)
            raise
    finally:
        ray.shutdown()
    _warn_unencrypted(desired)
    _say(f"{'starting' if is_new else 'found'} {desired.config.served_name} from {desired.config.model}")
    run = run_state(desired.config, logs, controller=controller, cluster=name)
    run = replace(run, pid=0, process_started_s=0.0, ray=address, expected_transport=None, is_here=False)
    folder.save_run(run)
    if timeout_s is None:
        _say(f"the controller serves on {controller}, and starts the processes: tandem status")
        return 0
    try:
        ask_controller(run, lambda client: bring_about(client, desired, is_new=is_new), timeout_s, num_past=100)
    except TandemError:
        if is_new:
            folder.clear()
        raise
    print_background_welcome(run)
    return 0


def _warn_unencrypted(desired: Desired) -> None:
    if desired.config.cluster_tls is None and not is_loopback(desired.config.controller):
        _say("warning: requests and the cluster token travel between the hosts unencrypted; set cluster_tls")


async def _serve(state: RunState, desired: Desired, began_s: float) -> int:
    """Until a signal. Raises the first TandemError of a process that cannot start."""
    signals = StopSignals()
    async with open_channel(state.controller, state.cluster_token, state.tls) as channel:
        client = ControllerClient(channel, desired.config.load_timeout_s + CONTROLLER_START_S)
        showing = asyncio.create_task(_show(await client.watch(state.cluster_token, 100)))
        asked = asyncio.create_task(signals.stop.wait())
        try:
            plan_json = "" if desired.plan is None else desired.plan.model_dump_json()
            await signals.unless_stopped(client.apply(desired.config.model_dump_json(), None, plan_json))
            if not signals.stop.is_set():
                print_welcome(desired.config, state, time.monotonic() - began_s)
            await asyncio.wait((showing, asked), return_when=asyncio.FIRST_COMPLETED)
            if not signals.stop.is_set():
                _say("the controller has ended, and the cluster with it")
                return 1
            waits = await what_to_wait_for(desired.config, desired.grace_s)
            _say(f"stopping{waits} (once more to stop at once)")
            await _stop(client, desired.grace_s, signals)
            return 0
        finally:
            for task in (showing, asked):
                task.cancel()
            await asyncio.gather(showing, asked, return_exceptions=True)


async def _stop(client: ControllerClient, grace_s: float, signals: StopSignals) -> None:
    stopping, forced = asyncio.create_task(client.stop(grace_s)), asyncio.create_task(signals.force.wait())
    await asyncio.wait((stopping, forced), return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        _say("stopping at once")
    stopping.cancel()
    forced.cancel()
    await asyncio.gather(stopping, forced, return_exceptions=True)


async def _show(lines: AsyncIterator[str]) -> None:
    """Until the controller has ended."""
    try:
        async for line in lines:
            _say(line)
    except UnavailableError:
        pass


def _say(line: str) -> None:
    announce(log, line)
