"""The plan file, and pages for people: why a plan is as it is, and what a run, simulated or live, was like.

Each page is one HTML file that loads nothing. What draws is imported when a page is written: matplotlib takes half a
second, and the commands that import this package mostly write none.
"""

from collections.abc import Sequence
from pathlib import Path

from tandem.core.slo import SloClass
from tandem.placement.evidence import Planned, RunDescription
from tandem.placement.report.plan_file import write_plan
from tandem.placement.simulator.result import SimulationResult

__all__ = ["RunDescription", "write_plan", "write_report", "write_simulation_report"]


def write_report(planned: Planned, path: Path) -> None:
    """Write the page of a plan. Raises OSError."""
    from tandem.placement.report.plan_report import report_html

    path.write_text(report_html(planned), encoding="utf-8")


def write_simulation_report(
    result: SimulationResult, classes: Sequence[SloClass], description: RunDescription, path: Path
) -> None:
    """Write the page of a run. A live run comes in the same form (bench.load.result.LoadResult.as_simulation).
    Raises OSError."""
    from tandem.placement.report.run_report import simulation_report_html

    path.write_text(simulation_report_html(result, classes, description), encoding="utf-8")
