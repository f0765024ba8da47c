"""Tells the routers of a cluster which plan it serves."""

import asyncio
from collections.abc import Callable, Sequence

from tandem.core.config import ServeConfig
from tandem.core.errors import TandemError
from tandem.core.plan import Plan
from tandem.wire.channels import LastingChannel
from tandem.wire.fleet import report_plan

_ROUND_S = 2.0
_CALL_S = 2.0


async def report_plans(
    plan: Callable[[], Plan | None], routers: Callable[[], Sequence[str]], config: Callable[[], ServeConfig]
) -> None:
    """Until cancelled. Every router is told again and again, at its control address: one that has been restarted, or
    has come later, knows nothing. One that cannot be reached is told in a later round."""
    channels: dict[str, LastingChannel] = {}
    try:
        while True:
            current, found = config(), plan()
            plan_json = "" if found is None else found.model_dump_json()
            for control in channels.keys() - set(routers()):
                await channels.pop(control).close()
            for control in routers():
                if control not in channels:
                    channels[control] = LastingChannel(control, current.cluster_token, current.cluster_tls)
            await asyncio.gather(*(_report(channel, plan_json) for channel in channels.values()))
            await asyncio.sleep(_ROUND_S)
    finally:
        for channel in channels.values():
            await channel.close()


async def _report(channel: LastingChannel, plan_json: str) -> None:
    try:
        await report_plan(await channel.get(), plan_json, _CALL_S)
    except TandemError:
        return
