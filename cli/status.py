"""`tandem status`: who runs, how busy, and by which transport KV travels."""

import argparse
import asyncio
import json
from dataclasses import asdict, replace
from typing import Any

from tandem.cli.common import add_pid_argument, find_run, say
from tandem.core.replanning import ReplanStatus
from tandem.core.session import InstanceStatus, LinkStats, Role
from tandem.core.text_table import text_table
from tandem.core.workload_profile import ProfileSnapshot
from tandem.deploy.run_state import RunState
from tandem.deploy.serving import fetch_fleet
from tandem.wire.fleet import FleetDescription

HELP = "show instances, load, KV memory and links"
DESCRIPTION = """\
Show the running cluster: addresses, each instance with its state and load, its KV blocks by owner, each link over which
KV has travelled with its transport and speed, and what requests have been like lately. Where a plan is served, also
whether it still fits them, and which other one would do better."""
EPILOG = """\
examples:
  tandem status
  tandem status --json | python -m json.tool
  watch -n1 tandem status

KV blocks: running (being computed or decoded), leased (computed, waiting to be fetched), cached (prefixes that may be
used again, given up when memory is needed), leaked (owned by nobody: a fault, please report it).

The plan is stable, suspect (requests have changed, perhaps for good), replanning, proposed (another plan would do
better: its folder has the plan and a report), or cooling (no other is looked for, for a while). A change of strength 1
or more may matter; 0 is chance.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs: everything, as one JSON object")
    add_pid_argument(parser)


def run(args: argparse.Namespace) -> int:
    state = find_run(args.pid)
    fleet = asyncio.run(fetch_fleet(state.control, state.cluster_token, with_profile=True))
    say(as_json(state, fleet) if args.json else as_text(state, fleet))
    return 0


def as_json(state: RunState, fleet: FleetDescription) -> str:
    """Everything but the token, and sampled lengths in brief. Names of roles and states are as in `core/session.py`."""
    public = {key: value for key, value in asdict(state).items() if key != "cluster_token"}
    brief = asdict(replace(fleet, profile=None))
    if fleet.profile is not None:
        brief["profile"] = _profile_fields(fleet.profile)
    return json.dumps({"run": public, "fleet": brief}, default=lambda value: value.value)


def as_text(state: RunState, fleet: FleetDescription) -> str:
    lines = [
        f"{fleet.model}: up {_duration(fleet.uptime_s)}, "
        f"{fleet.running_requests} running, {fleet.queued_requests} queued (pid {state.pid})",
        f"  HTTP http://{state.http}/v1   gRPC {state.grpc}   control {state.control}",
        f"  logs {state.log_folder}",
    ]
    if not fleet.instances:
        return "\n".join([*lines, *_requests(fleet), "", "no worker has reported yet"])
    header = ["INSTANCE", "STATE", "WAITING", "RUNNING", "KV BLOCKS", "STEPS", "MS/STEP", "ADDRESS"]
    instances = sorted(fleet.instances, key=lambda status: (status.role.value, status.instance_id), reverse=True)
    lines += ["", *text_table([header, *(_instance_row(status) for status in instances)])]
    receivers = (status for status in instances if status.role is Role.DECODE)  # both ends count; once is enough
    links = [_link_row(status, link) for status in receivers for link in status.links]
    if links:
        lines += [
            "",
            *text_table([["LINK FROM", "TO", "TRANSPORT", "TRANSFERS", "BYTES", "SPEED", "FAILURES"], *links]),
        ]
    return "\n".join([*lines, *_requests(fleet)])


def _requests(fleet: FleetDescription) -> list[str]:
    """What they are like, and whether the plan still fits them; nothing while nothing is known."""
    lines = [] if fleet.profile is None else ["", _profile_line(fleet.profile)]
    return lines if fleet.replan is None else [*lines, "", *_plan_lines(fleet.replan)]


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


def _plan_lines(replan: ReplanStatus) -> list[str]:
    lines = [f"plan: {replan.state.value}; {replan.note}"]
    if replan.changes:
        rows = [
            [change.name, f"{change.planned:.4g}", f"{change.live:.4g}", f"{change.strength:.2f}"]
            for change in replan.changes
        ]
        lines += text_table([["REQUESTS", "PLANNED", "LIVE", "STRENGTH"], *rows])
    if (proposal := replan.proposal) is not None:
        lines += [f"proposal: gain {proposal.gain:+.0%}. {proposal.summary}"]
        lines += [f"  {change}" for change in proposal.changes]
        lines += [f"  plan and report in {proposal.folder}"]
    return lines


def _instance_row(status: InstanceStatus) -> list[str]:
    blocks = status.blocks
    used = [f"{blocks.running} running", f"{blocks.cached} cached", f"{blocks.leased} leased"]
    if blocks.leaked:
        used.append(f"{blocks.leaked} LEAKED")
    step_ms = f"{1000 * status.step_s / status.steps:.1f}" if status.steps else "-"
    return [
        status.instance_id,
        status.state.value,
        f"{status.waiting_requests} ({status.waiting_tokens} tokens)",
        str(status.running_requests),
        f"{blocks.total - blocks.free}/{blocks.total} ({', '.join(used)})",
        str(status.steps),
        step_ms,
        status.address,
    ]


def _link_row(status: InstanceStatus, link: LinkStats) -> list[str]:
    return [
        link.peer_id,
        status.instance_id,
        link.transport,
        str(link.transfers),
        _bytes(link.transfer_bytes),
        _speed(link.transfer_bytes, link.transfer_s),
        str(link.failures),
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.2f} MB"


def _speed(count: int, seconds: float) -> str:
    return f"{count / 1e9 / seconds:.2f} GB/s" if seconds > 0 else "-"
