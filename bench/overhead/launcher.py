"""A cluster launcher with what the overhead benchmark needs: routers of other checkouts, and scripted workers."""

import time
from collections.abc import Mapping
from pathlib import Path

from tandem.profiling.cluster import MODEL_NAME, ClusterLauncher, StartedProcess, StartedRouter, wait_until_ready

CHECKOUT = Path(__file__).resolve().parents[2]


class OverheadLauncher(ClusterLauncher):
    """Runs the code of this checkout, unless it is told otherwise."""

    def __init__(self, model: Path) -> None:
        super().__init__(model, checkout=CHECKOUT)

    async def start_router_of(self, checkout: Path, settings: Mapping[str, object]) -> StartedRouter:
        """`settings` are those of the section `router`. Raises MeasurementError."""
        # Before all packages were below `tandem`, the router was a package of its own.
        module = "tandem.router" if (checkout / "tandem" / "router").exists() else "router"
        return await self.start_router_module(module, checkout, settings)

    async def start_scripted_workers(self, router: StartedRouter, step_s: float) -> None:
        """Raises MeasurementError."""
        await self.start("bench.overhead.scripted_workers", router.control, MODEL_NAME, self.cluster_token, str(step_s))
        await wait_until_ready(router)


def cpu_s(started: StartedProcess) -> float:
    """CPU time of all its threads so far, user and system."""
    cpu_clock = (~started.process.pid << 3) | 2  # as clock_getcpuclockid(3) computes it
    return time.clock_gettime(cpu_clock)


def cpu_s_by_thread(started: StartedProcess) -> dict[int, float]:
    """CPU time of each running thread; the id of the main thread is that of the process."""
    tasks = Path(f"/proc/{started.process.pid}/task")
    return {int(task.name): int((task / "schedstat").read_text().split()[0]) / 1e9 for task in tasks.iterdir()}
