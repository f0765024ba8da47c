"""`tandem doctor`: look at everything a cluster needs, and say what to do about what is missing."""

import argparse
import asyncio
from collections.abc import Iterator

from tandem.cli.common import add_config_arguments, read_config, say, state_folders
from tandem.core.config import ServeConfig
from tandem.core.errors import TandemError
from tandem.deploy import checks
from tandem.deploy.checks import Finding, Grade
from tandem.deploy.run_state import RunState
from tandem.deploy.serving import fetch_fleet

HELP = "check this machine, the model and the running cluster"
DESCRIPTION = """\
Check Python and packages, CPU and compiler, memory, ports, Ray, the checkpoint, the ways in which KV can travel, and,
if a cluster is running, whether its links took the fast transport. Says what to do about whatever is wrong. Starts
nothing and changes nothing. Exit status 1 if something failed."""
EPILOG = """\
examples:
  tandem doctor                          the built-in deployment
  tandem doctor serve.yaml               would this file run here?
  tandem doctor --set model=~/models/Qwen3-0.6B
"""
_MARKS = {Grade.OK: "ok     ", Grade.WARNING: "warning", Grade.FAILED: "FAILED "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    config = read_config(args.file, args.set)
    runs = state_folders().running()
    num_failed = 0
    for finding in examine(config, runs):
        say(f"{_MARKS[finding.grade]}  {finding.subject}: {finding.text}")
        if finding.advice:
            say(f"         -> {finding.advice}")
        num_failed += finding.grade is Grade.FAILED
    say(f"{num_failed} failed" if num_failed else "all well")
    return 1 if num_failed else 0


def examine(config: ServeConfig, runs: list[RunState]) -> Iterator[Finding]:
    """Every finding, the cheap checks first."""
    yield checks.check_python()
    yield checks.check_packages()
    yield from checks.check_cpu()
    yield checks.check_memory(config)
    yield from checks.check_ports(config, [address for run in runs for address in (run.http, run.grpc, run.control)])
    yield checks.check_ray()
    yield from checks.check_checkpoint(config)
    yield from checks.check_shared_memory()
    yield checks.check_gloo()
    for run in runs:
        yield from _check_run(run)


def _check_run(run: RunState) -> Iterator[Finding]:
    try:
        fleet = asyncio.run(fetch_fleet(run.control, run.cluster_token))
    except TandemError as error:
        advice = f"it may still be loading; its logs are in {run.log_folder}"
        yield Finding("cluster", Grade.FAILED, f"the router of pid {run.pid} does not answer: {error.message}", advice)
        return
    ready = sum(status.state.value == "ready" for status in fleet.instances)
    yield Finding(
        "cluster", Grade.OK, f"{fleet.model} (pid {run.pid}): {ready} of {len(fleet.instances)} workers ready"
    )
    yield from checks.check_links(fleet.instances, run.expected_transport)
