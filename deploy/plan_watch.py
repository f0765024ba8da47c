"""Watches the plan of a running cluster, through its router's control port."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc

from tandem.core.clock import SystemClock
from tandem.core.config import ServeConfig
from tandem.core.config_file import load_config
from tandem.core.errors import TandemError
from tandem.core.plan import Plan
from tandem.core.replanning import ReplanStatus
from tandem.core.slo_file import SloFile
from tandem.core.workload_profile import ProfileSnapshot
from tandem.deploy.planner_process import PlannerProcess
from tandem.deploy.replanner import Replanner
from tandem.wire.channels import open_channel
from tandem.wire.fleet import describe_fleet, report_replan

_TIMEOUT_S = 2.0


class RouterWindow:
    """What the router knows of its requests, and what it is told of the plan."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    async def profile(self) -> ProfileSnapshot | None:
        return (await describe_fleet(self._channel, _TIMEOUT_S, with_profile=True)).profile

    async def publish(self, status: ReplanStatus) -> None:
        await report_replan(self._channel, status, _TIMEOUT_S)


async def watch_plan(plan: Plan, config: ServeConfig, folder: Path, tell: Callable[[str], None]) -> None:
    """Until cancelled; or until it is clear that there is nothing to compare with, of which it tells. What planning
    again takes and gives is in `folder`."""
    if plan.slo_file is None:
        tell("the plan names no SLO file, so nobody can watch whether it still fits its requests")
        return
    channel = open_channel(config.router.control, config.cluster_token)
    try:
        slo_file = load_config(plan.slo_file, SloFile)
        router = RouterWindow(channel)
        replanner = await asyncio.to_thread(
            Replanner,
            plan,
            slo_file,
            router.profile,
            router.publish,
            planner=PlannerProcess(),
            clock=SystemClock(),
            folder=folder,
            tell=tell,
        )
        await replanner.run()
    except TandemError as error:
        tell(f"nobody watches whether the plan still fits its requests: {error.message}")
    finally:
        await channel.close()
