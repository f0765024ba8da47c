"""`tandem status`: who runs, how busy, and by which road KV travels."""

import argparse
import asyncio
import json
from dataclasses import asdict

from cli.common import add_pid_argument, find_run, say
from core.session import InstanceStatus, LinkStats, Role
from deploy.run_state import RunState
from deploy.serving import fetch_fleet
from wire.fleet import FleetDescription

HELP = "show instances, load, KV memory and links"
DESCRIPTION = """\
Show the running cluster: addresses, each instance with its state and load, its KV blocks by owner, and each link over
which KV has travelled with its road and speed."""
EPILOG = """\
examples:
  tandem status
  tandem status --json | python -m json.tool
  watch -n1 tandem status

KV blocks: running (being computed or decoded), leased (computed, waiting to be fetched), cached (prefixes that may be
used again, given up when memory is needed), leaked (owned by nobody: a fault, please report it).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs: everything, as one JSON object")
    add_pid_argument(parser)


def run(args: argparse.Namespace) -> int:
    state = find_run(args.pid)
    fleet = asyncio.run(fetch_fleet(state.control, state.cluster_token))
    say(as_json(state, fleet) if args.json else as_text(state, fleet))
    return 0


def as_json(state: RunState, fleet: FleetDescription) -> str:
    """Everything but the token. Names of roles and states are as in `core/session.py`."""
    public = {key: value for key, value in asdict(state).items() if key != "cluster_token"}
    return json.dumps({"run": public, "fleet": asdict(fleet)}, default=lambda value: value.value)


def as_text(state: RunState, fleet: FleetDescription) -> str:
    lines = [
        f"{fleet.model}: up {_duration(fleet.uptime_s)}, "
        f"{fleet.running_requests} running, {fleet.queued_requests} queued (pid {state.pid})",
        f"  HTTP http://{state.http}/v1   gRPC {state.grpc}   control {state.control}",
        f"  logs {state.log_folder}",
    ]
    if not fleet.instances:
        return "\n".join([*lines, "", "no worker has reported yet"])
    header = ["INSTANCE", "STATE", "WAITING", "RUNNING", "KV BLOCKS", "STEPS", "MS/STEP", "ADDRESS"]
    instances = sorted(fleet.instances, key=lambda status: (status.role.value, status.instance_id), reverse=True)
    lines += ["", *_table([header, *(_instance_row(status) for status in instances)])]
    receivers = (status for status in instances if status.role is Role.DECODE)  # both ends count; once is enough
    links = [_link_row(status, link) for status in receivers for link in status.links]
    if links:
        lines += ["", *_table([["LINK FROM", "TO", "ROAD", "TRANSFERS", "BYTES", "SPEED", "FAILURES"], *links])]
    return "\n".join(lines)


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
        link.road,
        str(link.transfers),
        _bytes(link.transfer_bytes),
        _speed(link.transfer_bytes, link.transfer_s),
        str(link.failures),
    ]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.2f} MB"


def _speed(count: int, seconds: float) -> str:
    return f"{count / 1e9 / seconds:.2f} GB/s" if seconds > 0 else "-"
