"""Writes plan files, HTML reports of plans and HTML reports of runs (simulated or live).

A report is one HTML file that loads no other files. Modules with plots are imported only when a report is written:
matplotlib takes half a second to import.
"""

from collections.abc import Sequence
from pathlib import Path

from tandem.core.config_file import dump_config
from tandem.core.slo import SloClass
from tandem.placement.evidence import Planned, RunDescription
from tandem.placement.report.formatting import headline
from tandem.placement.simulator.result import SimulationResult

__all__ = ["RunDescription", "write_plan", "write_report", "write_simulation_report"]


def write_plan(planned: Planned, path: Path) -> None:
    """Write the plan file, with comments. `core.config_file.load_config(path, Plan)` reads it. Raises OSError."""
    text = (
        f"# {headline(planned)}\n"
        f"# Written by tandem {planned.evidence.reproduction.version}. You may edit it; tandem checks it.\n"
        "# `tandem simulate` simulates the plan at another load; `tandem serve` runs it.\n"
        f"{dump_config(planned.plan)}"
    )
    path.write_text(text, encoding="utf-8")


def write_report(planned: Planned, path: Path) -> None:
    """Write the report of a plan. Raises OSError."""
    from tandem.placement.report.plan_report import report_html

    path.write_text(report_html(planned), encoding="utf-8")


def write_simulation_report(
    result: SimulationResult, classes: Sequence[SloClass], description: RunDescription, path: Path
) -> None:
    """Write the report of a run. A live run has the same form as a simulation. Raises OSError."""
    from tandem.placement.report.run_report import simulation_report_html

    path.write_text(simulation_report_html(result, classes, description), encoding="utf-8")
