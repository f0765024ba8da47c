"""Watches the plan of a running cluster through the control port of its router."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from tandem.core.clock import SystemClock
from tandem.core.config import ServeConfig
from tandem.core.config_file import load_config
from tandem.core.errors import TandemError
from tandem.core.plan import Plan
from tandem.core.replanning import ReplanStatus
from tandem.core.slo_file import SloFile
from tandem.core.workload_profile import ProfileSnapshot
from tandem.deploy.planner_process import plan_in_process
from tandem.deploy.replanner import Replanner
from tandem.wire.channels import open_channel
from tandem.wire.fleet import describe_fleet, report_replan

_TIMEOUT_S = 2.0


async def watch_plan(plan: Plan, config: ServeConfig, folder: Path, notify: Callable[[str], None]) -> None:
    """Runs until cancelled. Returns with a notice if the plan cannot be watched. Replanning writes to `folder`."""
    if plan.slo_file is None:
        notify(
            "the plan has no slo_file, so changes of the workload are not detected; make the plan with `tandem plan`"
        )
        return
    channel = open_channel(config.router.control, config.cluster_token, config.cluster_tls)

    async def read_profile() -> ProfileSnapshot | None:
        return (await describe_fleet(channel, _TIMEOUT_S, with_profile=True)).profile

    async def publish(status: ReplanStatus) -> None:
        await report_replan(channel, status, _TIMEOUT_S)

    try:
        slo_file = load_config(plan.slo_file, SloFile)
        replanner = await asyncio.to_thread(
            Replanner,
            plan,
            slo_file,
            read_profile,
            publish,
            run_planner=plan_in_process,
            clock=SystemClock(),
            folder=folder,
            notify=notify,
        )
        await replanner.run()
    except TandemError as error:
        notify(f"changes of the workload are not detected: {error.message}")
    finally:
        await channel.close()
