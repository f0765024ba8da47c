import asyncio
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tandem.core.clock import SystemClock
from tandem.core.config import ServeConfig
from tandem.core.plan import Plan
from tandem.deploy import plan_comparison
from tandem.deploy.desired import Desired
from tandem.deploy.plan_comparison import compare_with_plan
from tandem.deploy.serving import Serving
from tandem.deploy.topology import Machine
from tests.deploy.fake_launcher import FakeLauncher

CONFIG = ServeConfig(model=Path("/m"), cluster_token="secret")
PLANS = [Plan(model="/m", verdict="infeasible", summary=name, groups=()) for name in ("first", "second")]


def serving_of(plan: Plan | None) -> Serving:
    return Serving(Desired(CONFIG, plan=plan), lambda: Machine(cores=2), FakeLauncher(), SystemClock())


async def test_a_cluster_says_so_where_the_planner_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tandem.deploy.plan_watch", None)
    said = list[str]()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await compare_with_plan(serving_of(PLANS[0]), Path("/logs"), said.append)
    (line,) = said
    assert "that needs `pip install 'tandem-serve[plan]'`" in line


async def test_a_changed_plan_is_compared_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = list[str]()

    async def watch_plan(plan: Plan, *_: object) -> None:
        compared.append(plan.summary)
        await asyncio.Event().wait()

    watch = ModuleType("plan_watch")
    watch.watch_plan = watch_plan  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tandem.deploy.plan_watch", watch)
    monkeypatch.setattr(plan_comparison, "_LOOK_S", 0.01)
    serving = serving_of(None)
    comparing = asyncio.create_task(compare_with_plan(serving, Path("/logs"), compared.append))
    for plan in PLANS:
        await asyncio.sleep(0.05)
        serving.desired = serving.desired.with_config(CONFIG, plan)
    await asyncio.sleep(0.05)
    comparing.cancel()
    await asyncio.gather(comparing, return_exceptions=True)
    assert compared == ["first", "second"]
