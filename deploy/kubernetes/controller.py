"""The controller of a cluster on Kubernetes, as `tandem controller` runs it in a pod of its own.

    start: take charge of the ConfigMap -> find the pods that run -> serve -> bring about what is desired
    SIGTERM, or any other end: the pods go on; the next controller takes them back

What the chart says is desired at first, and again after each `helm upgrade` that changes it; in between, what commands
have asked for (decision 0026).
"""

import asyncio
import hashlib
import logging
import os
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from tandem.core.address import advertised
from tandem.core.clock import SystemClock
from tandem.core.config import ServeConfig, WorkerConfig, with_secrets
from tandem.core.errors import ConfigError, TandemError
from tandem.core.log_lines import announce, configure_logging
from tandem.deploy.controller_server import serve_controller
from tandem.deploy.desired import Desired
from tandem.deploy.instance_settings import role_change_of
from tandem.deploy.kept_task import cancel, keep
from tandem.deploy.kubernetes.api import KubernetesApi
from tandem.deploy.kubernetes.instance_pod import CLUSTER, PodSettings
from tandem.deploy.kubernetes.kept_state import KeptState
from tandem.deploy.kubernetes.pod_launcher import PodLauncher
from tandem.deploy.kubernetes.pod_watch import PodWatch
from tandem.deploy.plan_comparison import compare_with_plan
from tandem.deploy.run_state import StateFolders, run_state
from tandem.deploy.serving import Serving
from tandem.deploy.topology import Machine, ProcessSpec
from tandem.wire.channels import open_channel
from tandem.wire.sessions import configure_instance

log = logging.getLogger(__name__)

_CALL_S = 2.0
_PODS = Machine(cores=1, nodes=1)  # each instance has a pod, whatever the machine of this process is


async def run_controller(config: ServeConfig, pods: PodSettings, grace_s: float) -> None:
    """Until SIGTERM, which ends the process. Raises a TandemError if it cannot begin."""
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, lambda: _leave("the controller leaves; its pods go on"))
    configure_logging(config.log_format, "controller")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # else each question to Kubernetes is a line
    if config.start_router:
        raise ConfigError("set start_router to false: on Kubernetes routers are a Deployment")
    api, clock = KubernetesApi.connect(), SystemClock()
    settings, config_id = with_secrets(config), hashlib.sha256(config.model_dump_json().encode()).hexdigest()
    state = KeptState(api, pods.config_map, config_id, settings.cluster_token, _leave)
    desired = await _desired(state, settings, grace_s)
    await state.save(desired)  # from here on this controller is in charge
    watch = PodWatch(api, {CLUSTER: pods.cluster})

    async def introduce(spec: ProcessSpec, address: str) -> str:
        wanted = {each.name: each for each in serving.desired.processes(_PODS)}
        spec = wanted.get(spec.name, spec)  # a pod that was left running may have changed its role since it was made
        assert isinstance(spec.config, WorkerConfig), "only instances are pods of the controller"
        async with open_channel(address, settings.cluster_token, settings.cluster_tls) as channel:
            return await configure_instance(channel, role_change_of(spec.config), _CALL_S)

    launcher = PodLauncher(
        api,
        watch,
        pods,
        introduce,
        state.check_in_charge,
        clock,
        token=config.cluster_token,
        secret=settings.cluster_token,
        load_timeout_s=config.load_timeout_s,
    )
    serving = Serving(
        desired,
        lambda: _PODS,
        launcher,
        clock,
        save=state.save,
        show=_say,
        tells_routers=False,
        read_log=launcher.read_log,
        starts_first=lambda spec: pods.group_of(spec).starts_first,
    )
    following = keep("the watch of pods", watch.run, _say)
    left_running = await launcher.find_left_running()
    serving.take_back(left_running)
    async with serve_controller(serving, desired.config) as address:
        _write_run(desired.config, address, pods.cluster)
        _say(f"the controller serves on {address}; {len(left_running)} instances were left running")
        with tempfile.TemporaryDirectory() as folder:
            helpers = [
                following,
                keep("the report of events", serving.say_events, _say),
                keep("the news for processes", serving.tell_processes, _say),
                keep("the start", lambda: _start(serving), _say),
                keep("the comparison with the plan", lambda: compare_with_plan(serving, Path(folder), _say), _say),
            ]
            await serving.has_stopped.wait()
            await cancel(helpers)
    await api.close()


async def _desired(state: KeptState, settings: ServeConfig, grace_s: float) -> Desired:
    """What is kept, or, if the chart's settings are others than those for which it was kept, these."""
    new = Desired(settings, grace_s)
    try:
        kept, is_current = await state.load()
    except (ValueError, KeyError, TypeError) as error:
        _say(f"what an earlier controller has kept cannot be read ({error}); the chart's settings count")
        return new
    if kept is None or is_current:
        return kept or new
    return replace(new, drained=kept.drained).reusing(kept, _PODS)


async def _start(serving: Serving) -> None:
    try:
        await serving.start()
        _say("all instances are up")
    except TandemError as error:  # what has failed is tried again
        _say(f"not all instances are up: {error.message}")


def _write_run(config: ServeConfig, address: str, cluster: str) -> None:
    """So that `tandem` commands in this pod find the cluster."""
    folders = StateFolders.of_environment(os.environ)
    folders.make()
    run = run_state(config, folders.logs, controller=advertised(address, "127.0.0.1"), cluster=cluster)
    folders.write(replace(run, log_folder="", expected_transport=None, is_here=False))


def _say(line: str) -> None:
    announce(log, line)


def _leave(line: str) -> NoReturn:
    _say(line)
    os._exit(0)
