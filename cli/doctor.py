"""`tandem doctor`: check everything that a cluster needs, and say how to mend what is missing."""

import asyncio
from collections.abc import Iterator

from rich.text import Text

from tandem.cli.common import ServeFile, Settings, read_config, state_folders
from tandem.cli.output import print_line, print_rich
from tandem.core.config import ServeConfig
from tandem.core.errors import TandemError
from tandem.deploy import checks
from tandem.deploy.checks import Finding, Grade
from tandem.deploy.run_state import RunState
from tandem.deploy.serving import fetch_fleet

EPILOG = """\
examples:
  tandem doctor                                 the built-in deployment
  tandem doctor serve.yaml                      would this file run here?
  tandem doctor --set model=~/models/Qwen3-0.6B"""
_STYLES = {Grade.OK: "green", Grade.WARNING: "yellow", Grade.FAILED: "bold red"}


def run(file: ServeFile = None, *, settings: Settings) -> int:
    """Check Python and packages, CPU and compiler, memory, ports, Ray, the checkpoint, the transports for KV, and,
    where a cluster is running, whether its links use the fast transport. For each problem it says what to do. It starts
    nothing and changes nothing. The exit status is 1 if a check failed."""
    num_failed = 0
    for finding in examine(read_config(file, settings), state_folders().running()):
        grade = Text(f"{finding.grade.value:<7}", style=_STYLES[finding.grade])
        print_rich(grade.append(f"  {finding.subject}: {finding.text}", style="default"))
        if finding.advice:
            print_line(f"         -> {finding.advice}")
        num_failed += finding.grade is Grade.FAILED
    print_line(f"{num_failed} checks failed" if num_failed else "all checks passed")
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
