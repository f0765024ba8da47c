"""`python -m tandem.deploy.plan_again FOLDER`: the process of `deploy.planner_process`, at the lowest priority.

Reads running_plan.yaml and slo.yaml in FOLDER; writes plan.yaml, report.html and result.json to FOLDER.
"""

import argparse
import os
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

from tandem.core.config_file import load_config
from tandem.core.errors import TandemError
from tandem.core.plan import Plan
from tandem.core.slo_file import SloFile
from tandem.deploy.planner_process import write_result
from tandem.deploy.replanner import ReplanResult
from tandem.placement.planner import plan
from tandem.placement.replanning.live_workload import RUNNING_PLAN_NAME, SLO_FILE_NAME
from tandem.placement.replanning.replan import replan
from tandem.placement.report import write_plan, write_report
from tandem.placement.workload.traces import load_trace


def plan_again(folder: Path) -> None:
    """Raises a TandemError."""
    slo_path = (folder / SLO_FILE_NAME).resolve()
    slo_file = load_config(slo_path, SloFile)
    assert slo_file.workload.trace is not None, "the live workload is a trace"
    rate = load_trace(slo_file.workload.trace).rate
    plan_in_one_process = partial(plan, workers=1)  # more processes would slow down serving
    comparison = replan(load_config(folder / RUNNING_PLAN_NAME, Plan), slo_file, rate, plan_in_one_process)
    proposed = comparison.planned.plan.model_copy(update={"slo_file": slo_path})
    planned = replace(comparison.planned, plan=proposed)
    write_plan(planned, folder / "plan.yaml")
    write_report(planned, folder / "report.html")
    write_result(
        folder,
        ReplanResult(
            proposed.summary,
            comparison.changes,
            comparison.gain,
            comparison.regains,
            comparison.current.attainment,
        ),
    )


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not sys.stdin: a thread that holds its lock would block the normal exit
        pass
    os._exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tandem.deploy.plan_again", description="Make a plan for the live workload."
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    os.nice(19)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        plan_again(folder)
    except TandemError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
