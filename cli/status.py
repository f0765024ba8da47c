"""`tandem status`: who runs, how busy, and by which transport KV travels."""

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.text import Text

from tandem.cli.common import Pid, seconds_from
from tandem.cli.output import console, print_line, print_rich, table
from tandem.cli.router_file import RouterFile, find_router
from tandem.cli.signals import StopSignals
from tandem.core.cluster_status import ClusterStatus, ProcessState
from tandem.core.errors import TandemError
from tandem.core.replanning import ReplanStatus
from tandem.core.session import InstanceState, InstanceStatus, LinkStats, Role
from tandem.core.workload_profile import ProfileSnapshot
from tandem.deploy.fleet_query import fetch_fleet
from tandem.deploy.run_state import RunState
from tandem.wire.channels import open_channel
from tandem.wire.controller import ControllerClient
from tandem.wire.fleet import FleetDescription

EPILOG = """\
examples:
  tandem status
  tandem status --watch --interval 0.5
  tandem status --json | python -m json.tool
  tandem status --router router.yaml

KV blocks: running (in use by a request), leased (computed, waiting to be fetched), cached (prefixes that may be used
again, given up when memory is needed), leaked (without an owner: a fault, please report it).

The plan is stable, suspect (requests have changed, perhaps for good), replanning, proposed (another plan would do
better: its folder has the plan and a report), or cooling (no search for another plan for a while). A change of strength
1 or more may matter; 0 is chance."""


Show = Callable[[RunState, FleetDescription | None, ClusterStatus | None], None]
_CALL_S = 2.0


def run(
    json_lines: Annotated[bool, typer.Option("--json", help="for programs: everything, as one JSON object")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="show it again and again until Ctrl-C")] = False,
    interval: Annotated[
        float, typer.Option(parser=seconds_from(0.1), help="seconds between two looks, with --watch")
    ] = 1.0,
    pid: Pid = None,
    router: RouterFile = None,
) -> int:
    """Show the running cluster: addresses, each instance with its state and load, its KV blocks by owner, each link
    over which KV has travelled with its transport and speed, what recent requests are like, and which processes do not
    run as they should. Where a plan is served, also whether it still fits the requests, and which other plan would do
    better."""
    find = partial(find_router, pid, router)
    if not watch:
        asyncio.run(_look(find, partial(_show, json_lines)))
    elif sys.stdout.isatty() and not json_lines:
        with Live(console=console(sys.stdout), auto_refresh=False) as live:
            asyncio.run(_watch(find, interval, lambda *seen: live.update(Group(*as_parts(*seen)), refresh=True)))
    else:
        asyncio.run(_watch(find, interval, partial(_show, json_lines)))
    return 0


async def _watch(find: Callable[[], RunState], interval_s: float, show: Show) -> None:
    """Until a signal. An interrupt as an exception can be lost: one that comes in a callback of a C library is only
    written down there."""
    signals = StopSignals()
    while not signals.stop.is_set():
        await signals.unless_stopped(_look(find, show))
        await signals.unless_stopped(asyncio.sleep(interval_s))


async def _look(find: Callable[[], RunState], show: Show) -> None:
    """The router knows the load, the controller the processes; one of them may be away."""
    state = find()  # each time: it may have been restarted
    cluster = await _ask_controller(state)
    try:
        fleet = await fetch_fleet(state.control, state.cluster_token, state.tls, with_profile=True)
    except TandemError:
        if cluster is None:
            raise
        fleet = None
    show(state, fleet, cluster)


async def _ask_controller(state: RunState) -> ClusterStatus | None:
    if not state.controller:  # of `tandem serve`, which is just starting, or of a router without one
        return None
    try:
        async with open_channel(state.controller, state.cluster_token, state.tls) as channel:
            return await ControllerClient(channel, _CALL_S).status()
    except TandemError:
        return None


def _show(json_lines: bool, state: RunState, fleet: FleetDescription | None, cluster: ClusterStatus | None) -> None:
    if json_lines:
        print_line(as_json(state, fleet, cluster))
    else:
        print_rich(*as_parts(state, fleet, cluster))


def as_json(state: RunState, fleet: FleetDescription | None, cluster: ClusterStatus | None = None) -> str:
    """Everything but the token; of sampled lengths only mean and quantiles. Roles and states: `core/session.py`,
    `core/cluster_status.py`."""
    public = {key: value for key, value in asdict(state).items() if key != "cluster_token"}
    brief = None if fleet is None else asdict(replace(fleet, profile=None))
    if brief is not None and fleet is not None and fleet.profile is not None:
        brief["profile"] = _profile_fields(fleet.profile)
    processes = None if cluster is None else asdict(cluster)
    return json.dumps({"run": public, "fleet": brief, "cluster": processes}, default=lambda value: value.value)


def as_parts(
    state: RunState, fleet: FleetDescription | None, cluster: ClusterStatus | None = None
) -> list[RenderableType]:
    """Texts and tables for a person."""
    processes = [] if cluster is None else _process_parts(cluster)
    if fleet is None:
        return [f"{state.model} (pid {state.pid}): no router answers", f"  logs {state.log_folder}", *processes]
    return [*_fleet_parts(state, fleet), *processes]


def _process_parts(cluster: ClusterStatus) -> list[RenderableType]:
    """Processes that do not run as they should; empty if all do."""
    rows = [
        [
            process.name,
            process.role,
            process.state.value,
            str(process.pid or "-"),
            str(process.failures),
            process.note,
        ]
        for process in cluster.processes
        if process.state is not ProcessState.UP
    ]
    return ["", table(["PROCESS", "ROLE", "STATE", "PID", "FAILURES", "LAST FAILURE"], rows)] if rows else []


def _fleet_parts(state: RunState, fleet: FleetDescription) -> list[RenderableType]:
    parts: list[RenderableType] = [
        f"{fleet.model}: up {_duration(fleet.uptime_s)}, "
        f"{fleet.running_requests} running, {fleet.queued_requests} queued{f' (pid {state.pid})' if state.pid else ''}",
        f"  HTTP {state.url}/v1   gRPC {state.grpc}   control {state.control}",
        *([f"  logs {state.log_folder}"] if state.log_folder else []),
    ]
    if not fleet.instances:
        return [*parts, *_requests(fleet), "", "no worker has reported yet"]
    instances = sorted(fleet.instances, key=lambda status: (status.role.value, status.instance_id), reverse=True)
    header = ["INSTANCE", "ROLE", "STATE", "WAITING", "RUNNING", "KV BLOCKS", "STEPS", "MS/STEP", "ADDRESS"]
    parts += ["", table(header, [_instance_row(status) for status in instances])]
    receivers = (status for status in instances if status.role is Role.DECODE)  # both ends count; once is enough
    links = [_link_row(status, link) for status in receivers for link in status.links]
    if links:
        parts += ["", table(["LINK FROM", "TO", "TRANSPORT", "TRANSFERS", "BYTES", "SPEED", "FAILURES"], links)]
    return [*parts, *_requests(fleet)]


def _requests(fleet: FleetDescription) -> list[RenderableType]:
    """Recent requests, and whether the plan still fits them; empty while nothing is known."""
    profile: list[RenderableType] = [] if fleet.profile is None else ["", _profile_line(fleet.profile)]
    return profile if fleet.replan is None else [*profile, "", *_plan_parts(fleet.replan)]


def _profile_line(profile: ProfileSnapshot) -> str:
    fields = _profile_fields(profile)
    return (
        f"requests of {_duration(profile.window_s)}: {profile.rate:.2f}/s, "
        f"prompts of {_spread_text(fields['prompt_tokens'])} tokens ({fields['cached_share']:.0%} cached), "
        f"answers of {_spread_text(fields['output_tokens'])}"
    )


def _spread_text(spread: dict[str, float]) -> str:
    return f"{spread['mean']:.0f} (p50 {spread['p50']:.0f}, p90 {spread['p90']:.0f})"


def _profile_fields(profile: ProfileSnapshot) -> dict[str, Any]:
    return {
        "window_s": profile.window_s,
        "arrivals": profile.arrivals,
        "rate": profile.rate,
        "arrival_cv": profile.arrival_cv,
        "finished": profile.finished,
        "prompt_tokens": _spread(profile.prompt_tokens),
        "output_tokens": _spread(profile.output_tokens),
        "cached_share": sum(profile.cached_tokens) / sum(profile.prompt_tokens),
    }


def _spread(values: tuple[int, ...]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "mean": sum(ordered) / len(ordered),
        "p50": ordered[len(ordered) // 2],
        "p90": ordered[9 * len(ordered) // 10],
    }


def _plan_parts(replan: ReplanStatus) -> list[RenderableType]:
    parts: list[RenderableType] = [f"plan: {replan.state.value}; {replan.note}"]
    if replan.changes:
        rows = [
            [change.name, f"{change.planned:.4g}", f"{change.live:.4g}", f"{change.strength:.2f}"]
            for change in replan.changes
        ]
        parts.append(table(["REQUESTS", "PLANNED", "LIVE", "STRENGTH"], rows))
    if (proposal := replan.proposal) is not None:
        parts.append(f"proposal: gain {proposal.gain:+.0%}. {proposal.summary}")
        parts += [f"  {change}" for change in proposal.changes]
        parts.append(f"  plan and report in {proposal.folder}")
    return parts


def _instance_row(status: InstanceStatus) -> list[str | Text]:
    blocks = status.blocks
    used = Text(f"{blocks.total - blocks.free}/{blocks.total} ({blocks.running} running, {blocks.cached} cached, ")
    used.append(f"{blocks.leased} leased")
    if blocks.leaked:
        used.append(", ").append(f"{blocks.leaked} LEAKED", style="bold red")
    step_ms = f"{1000 * status.step_s / status.steps:.1f}" if status.steps else "-"
    return [
        status.instance_id,
        status.role.value,
        Text(status.state.value, style="green" if status.state is InstanceState.READY else "yellow"),
        f"{status.waiting_requests} ({status.uncomputed_tokens + status.unreserved_tokens} tokens)",
        str(status.running_requests),
        used.append(")"),
        str(status.steps),
        step_ms,
        status.address,
    ]


def _link_row(status: InstanceStatus, link: LinkStats) -> list[str | Text]:
    return [
        link.peer_id,
        status.instance_id,
        link.transport if link.codec in ("none", "") else f"{link.transport}, {link.codec}",
        str(link.transfers),
        decimal(link.transfer_bytes, precision=2),
        f"{decimal(int(link.transfer_bytes / link.transfer_s), precision=2)}/s" if link.transfer_s else "-",
        str(link.failures),
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
