"""Compares live requests with the plan that a cluster serves, as long as it serves it."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from tandem.deploy.desired import Desired
from tandem.deploy.kept_task import cancel
from tandem.deploy.serving import Serving

_LOOK_S = 1.0


async def compare_with_plan(serving: Serving, folder: Path, say: Callable[[str], None]) -> None:
    """Until cancelled. `say` gets a line about each event. Other plans that would do better go to new folders below
    `folder`."""
    while True:
        plan, control = serving.desired.plan, serving.config.router.control
        comparing = asyncio.create_task(_compare(serving.desired, folder, say), name="comparison with the plan")
        try:
            while (serving.desired.plan, serving.config.router.control) == (plan, control):
                await asyncio.sleep(_LOOK_S)
                if comparing.done():
                    comparing.result()  # raises what nobody expects
        finally:
            await cancel([comparing])


async def _compare(desired: Desired, folder: Path, say: Callable[[str], None]) -> None:
    """Until cancelled; ends with a line if there is nothing to compare."""
    if desired.plan is None:
        return
    try:
        from tandem.deploy.plan_watch import watch_plan  # SciPy, which a serve file does not need
    except ModuleNotFoundError as error:
        say(f"  plan: not compared with live requests; that needs `pip install 'tandem-serve[plan]'` ({error})")
        return
    folder = folder / time.strftime("plan-%Y%m%d-%H%M%S")
    await watch_plan(desired.plan, desired.config, folder, lambda note: say(f"  plan: {note}"))
