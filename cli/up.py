"""`tandem up`: start a cluster that outlives the terminal."""

import importlib.util
import os
import subprocess
import time
from typing import Annotated

import typer

from tandem.cli.common import (
    Name,
    ServeFile,
    Settings,
    Timeout,
    Wait,
    ask_controller,
    bring_about,
    seconds_from,
    state_folders,
    the_cluster_goes_on,
)
from tandem.cli.on_ray import RayAddress, up_on_ray
from tandem.cli.output import print_line
from tandem.cli.prepare import free_addresses, prepare
from tandem.cli.welcome import print_background_welcome
from tandem.core.errors import ConfigError, UnavailableError
from tandem.deploy.cluster_folder import ClusterFolder
from tandem.deploy.controller_process import command_of
from tandem.deploy.desired import Desired
from tandem.deploy.hosted_process import import_path
from tandem.deploy.run_state import RunState
from tandem.deploy.serving import with_token

EPILOG = """\
examples:
  tandem up                          the built-in model, 1 prefill + 1 decode
  tandem up plan.yaml
  tandem up plan.yaml --ray 10.0.0.1:6379    on the nodes of a running Ray cluster
  tandem up                          again: a new controller for a cluster whose controller has ended
  tandem status; tandem logs decode-0; tandem down"""
_CONTROLLER_START_S = 60.0
_POLL_S = 0.05


def run(
    file: ServeFile = None,
    *,
    settings: Settings,
    name: Name = "default",
    grace: Annotated[
        float, typer.Option(parser=seconds_from(0), help="seconds that requests of a process that stops may take")
    ] = 10.0,
    timeout: Timeout = 900.0,
    wait: Wait = True,
    ray: RayAddress = None,
) -> int:
    """Start a router, prefill workers and decode workers on this machine, without Ray, and return when they are ready.
    A controller in the background keeps them running; it goes on when this terminal closes. When the controller itself
    ends, for whatever reason, the processes go on, and the next `tandem up` without a FILE starts a controller that
    takes them back. `tandem down` ends everything.

    With --ray the processes are on all nodes of a Ray cluster that runs already, and so is the controller: Ray starts
    it again when it ends, on another node if its own is gone. The same command without a FILE, on any node, finds it.

    FILE is a serve file, a plan (of `tandem plan`), or an SLO file, for which a plan is made first.
    """
    if importlib.util.find_spec("torch") is None:  # the workers import it
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    if ray is not None:
        return up_on_ray(ray, file, settings, name, grace, timeout if wait else None)
    folder = ClusterFolder.of_name(state_folders().clusters, name)
    if (run := folder.live_run()) is not None:
        raise ConfigError(f"the cluster '{name}' runs already (pid {run.pid}); change it with: tandem apply FILE")
    folder.make()
    with folder.lock():
        desired = folder.load_desired()
        is_new = desired is None
        if desired is None:
            prepared = prepare(file, settings)
            config = with_token(free_addresses(prepared.config, []))
            desired = Desired(config, grace, plan=prepared.plan)
            folder.save_desired(desired)
        elif file is not None or settings:
            raise ConfigError(
                f"the cluster '{name}' has been started already, and its controller has ended; start the controller "
                "with `tandem up` without a file, and change the cluster with `tandem apply FILE`"
            )
    print_line(f"{'starting' if is_new else 'taking back'} {desired.config.served_name} from {desired.config.model}")
    with the_cluster_goes_on():
        run = _start_controller(folder)
    if not wait:
        print_line(f"the controller runs (pid {run.pid}), and starts the processes: tandem status")
        return 0
    try:
        ask_controller(run, lambda client: bring_about(client, desired, is_new=is_new), timeout, num_past=100)
    except UnavailableError as error:
        if folder.live_run() is None and folder.load_desired() is not None:
            raise UnavailableError(
                "the controller has ended before all was ready; `tandem up` starts another one, and `tandem down` ends "
                f"what runs; its log is {folder.logs / 'controller.log'}"
            ) from error
        raise
    print_background_welcome(run)
    return 0


def _start_controller(folder: ClusterFolder) -> RunState:
    """Returns when the controller serves. Raises UnavailableError."""
    log_path = folder.logs / "controller.log"
    with log_path.open("ab") as log:
        controller = subprocess.Popen(
            command_of(folder),
            env=os.environ | import_path(),
            cwd="/",  # it must not keep a folder from being unmounted
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    until_s = time.monotonic() + _CONTROLLER_START_S
    while (run := folder.live_run()) is None or run.pid != controller.pid:
        if controller.poll() is not None:
            last = log_path.read_text(errors="replace").strip().rpartition("\n")[2]
            raise UnavailableError(f"the controller did not start: {last}; its log is {log_path}")
        if time.monotonic() > until_s:
            raise UnavailableError(f"the controller did not start within {_CONTROLLER_START_S:g} s; see {log_path}")
        time.sleep(_POLL_S)
    return run
