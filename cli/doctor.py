"""`tandem doctor`: check everything that a cluster needs, and say how to mend what is missing."""

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from tandem.cli.common import (
    ApiKeyFile,
    Ca,
    ClientCertificate,
    ClientKey,
    ServeFile,
    Settings,
    read_api_key,
    read_config,
    state_folders,
)
from tandem.cli.output import print_line, print_rich
from tandem.client_tls import ClientTls
from tandem.core.clock import SystemClock
from tandem.core.config import ServeConfig
from tandem.core.errors import TandemError
from tandem.deploy import host_checks
from tandem.deploy.access_checks import check_access
from tandem.deploy.finding import Finding, Grade
from tandem.deploy.fleet_query import fetch_fleet
from tandem.deploy.link_check import check_links
from tandem.deploy.machine import this_machine
from tandem.deploy.run_state import RunState
from tandem.deploy.settings_checks import check_checkpoint, check_memory, check_settings
from tandem.wire.fleet import FleetDescription

EPILOG = """\
examples:
  tandem doctor                                 the built-in deployment
  tandem doctor serve.yaml                      would this file run here?
  tandem doctor --set model=~/models/Qwen3-0.6B"""
_TRIAL_S = 30.0
_STYLES = {Grade.OK: "green", Grade.WARNING: "yellow", Grade.FAILED: "bold red"}


@dataclass(frozen=True, slots=True)
class ClientAccess:
    """With what the clusters that run are asked as by a client."""

    api_key: str | None = None
    tls: ClientTls = field(default_factory=ClientTls)


def run(
    file: ServeFile = None,
    *,
    settings: Settings,
    api_key_file: ApiKeyFile = None,
    ca: Ca = None,
    certificate: ClientCertificate = None,
    key: ClientKey = None,
) -> int:
    """Check Python and packages, CPU and compiler, memory, ports, folders, keys and certificates, Ray, the settings,
    the checkpoint, and the transports for KV. Where a cluster is running, send a request of two tokens over HTTP, over
    gRPC, and through each pair of instances, and check whether its links use the fast transport. For each problem it
    says what to do. It starts nothing and changes nothing. The exit status is 1 if a check failed."""
    num_failed = 0
    client = ClientAccess(read_api_key(api_key_file), ClientTls(ca, certificate, key))
    for finding in examine(read_config(file, settings), state_folders().running(), client, file):
        grade = Text(f"{finding.grade.value:<7}", style=_STYLES[finding.grade])
        print_rich(grade.append(f"  {finding.subject}: {finding.text}", style="default"))
        if finding.advice:
            print_line(f"         -> {finding.advice}")
        num_failed += finding.grade is Grade.FAILED
    print_line(f"{num_failed} checks failed" if num_failed else "all checks passed")
    return 1 if num_failed else 0


def examine(config: ServeConfig, runs: list[RunState], client: ClientAccess, file: Path | None) -> Iterator[Finding]:
    """Every finding, the cheap checks first. `client`: for the clusters that run; `file`: the configuration's."""
    machine = this_machine()
    yield host_checks.check_python()
    yield host_checks.check_packages()
    yield from host_checks.check_cpu()
    yield check_memory(config, machine)
    yield from host_checks.check_ports(
        config, [address for run in runs for address in (run.http, run.grpc, run.control)]
    )
    yield from host_checks.check_folders(state_folders())
    yield from check_access(config, file)
    yield host_checks.check_ray()
    yield from check_settings(config, machine)
    yield from check_checkpoint(config)
    yield from host_checks.check_shared_memory()
    yield host_checks.check_gloo()
    # One event loop for all: what gRPC still has for a loop that is closed would disturb the next one.
    with asyncio.Runner() as runner:
        for run in runs:
            yield from _check_run(runner, run, client)


def _check_run(runner: asyncio.Runner, run: RunState, client: ClientAccess) -> Iterator[Finding]:
    try:
        fleet = runner.run(fetch_fleet(run.control, run.cluster_token, run.tls))
    except TandemError as error:
        advice = f"it may still be loading; its logs are in {run.log_folder}"
        yield Finding("cluster", Grade.FAILED, f"the router of pid {run.pid} does not answer: {error.message}", advice)
        return
    ready = sum(status.state.value == "ready" for status in fleet.instances)
    grade = Grade.OK if 0 < ready == len(fleet.instances) else Grade.WARNING if ready else Grade.FAILED
    text = f"{fleet.model} (pid {run.pid}): {ready} of {len(fleet.instances)} workers ready"
    yield Finding("cluster", grade, text, "" if grade is Grade.OK else "`tandem status` shows their states")
    yield from _try_run(runner, run, fleet, client)
    fleet = runner.run(fetch_fleet(run.control, run.cluster_token, run.tls))  # with the transfers of the trial
    yield from check_links(fleet.instances, run.expected_transport)


def _try_run(runner: asyncio.Runner, run: RunState, fleet: FleetDescription, client: ClientAccess) -> Iterator[Finding]:
    """Requests of two tokens: as a client sends them, and through each pair and each colocated instance."""
    from tandem.deploy import trial  # the router's code, which other checks do not need

    clock, tls = SystemClock(), client.tls if run.has_tls else None
    http = asyncio.to_thread(trial.try_http, run.http, fleet.model, _TRIAL_S, clock, client.api_key, tls)
    logs = f"the logs in {run.log_folder} say why"
    yield _tried(runner, "request", "over HTTP", http, f"router-0.log in {run.log_folder} says why")
    over_grpc = trial.try_router(run.grpc, _TRIAL_S, clock, client.api_key, tls)
    yield _tried(runner, "request", "over gRPC", over_grpc, logs)
    for instances in trial.ways_through(fleet.instances):
        names = " -> ".join(status.instance_id for status in instances)
        tried = trial.try_instances(instances, fleet.model, run.cluster_token, _TRIAL_S, clock, run.tls)
        yield _tried(runner, "pair" if len(instances) > 1 else "instance", names, tried, logs)


def _tried(
    runner: asyncio.Runner, subject: str, name: str, request: Coroutine[Any, Any, float], advice: str
) -> Finding:
    try:
        took_s = runner.run(request)
    except TandemError as error:
        return Finding(subject, Grade.FAILED, f"{name}: a request of two tokens fails: {error.message}", advice)
    return Finding(subject, Grade.OK, f"{name}: two tokens in {1000 * took_s:.0f} ms")
