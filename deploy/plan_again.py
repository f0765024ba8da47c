"""`python -m deploy.plan_again FOLDER`: the planner's side of `deploy.planner_process`, at the lowest priority.

Reads running_plan.yaml and slo.yaml in FOLDER; writes plan.yaml, report.html and answer.json there.
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
from tandem.deploy.planner_process import write_answer
from tandem.deploy.replanner import ReplanAnswer
from tandem.placement.planner import plan
from tandem.placement.replanning.live_workload import QUESTION, RUNNING_PLAN
from tandem.placement.replanning.replan import replan
from tandem.placement.report import write_plan, write_report
from tandem.placement.workload.traces import load_trace


def answer_question(folder: Path) -> None:
    """Raises a TandemError."""
    question_path = (folder / QUESTION).resolve()
    question = load_config(question_path, SloFile)
    assert question.workload.trace is not None, "live requests are a trace"
    rate = load_trace(question.workload.trace).rate
    one_process = partial(plan, workers=1)  # more would take from serving what the priority leaves it
    answer = replan(load_config(folder / RUNNING_PLAN, Plan), question, rate, one_process)
    proposed = answer.planned.plan.model_copy(update={"slo_file": question_path})
    planned = replace(answer.planned, plan=proposed)
    write_plan(planned, folder / "plan.yaml")
    write_report(planned, folder / "report.html")
    write_answer(
        folder,
        ReplanAnswer(proposed.summary, answer.changes, answer.gain, answer.regains, answer.current.attainment),
    )


def _end_with_whoever_asked() -> None:
    while os.read(0, 4096):  # not through sys.stdin, whose lock would be held when this process ends by itself
        pass
    os._exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.plan_again", description="Plan for live requests.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    os.nice(19)
    threading.Thread(target=_end_with_whoever_asked, daemon=True).start()
    try:
        answer_question(folder)
    except TandemError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
