"""Does the replanner follow a change of traffic, and does it keep still when it should?

Two traces of real traffic alternate, Azure's conversation and code services of 2023, on a virtual clock. The programme
runs the code of `tandem serve`: the router's profile, `deploy.replanner`, and the simulator, which evaluates plans.
Only the planner is a small one, which splits a fixed number of equal instances between prefill and decode: a search of
minutes would show no more about hysteresis. The running plan is the best split for conversation and never changes:
nobody applies the proposals.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path

from bench.common.data_folder import add_data_argument
from bench.replanning.replay import KINDS, SLO_FILE, WINDOW_S, Replay, ReplayCase, ReplayOutcome, traces, traffic
from bench.replanning.split_planner import DEVICE, MODEL, TP, SplitPlanner
from tandem.core.text_table import text_table
from tandem.placement.workload.requests import RequestStream

CASES = (
    ReplayCase("conversation only", float("inf")),
    ReplayCase("1 min each", 60.0),
    ReplayCase("5 min each (a window)", 300.0),
    ReplayCase("15 min each (three windows)", 900.0),
    ReplayCase("1 h each", 3600.0),
    ReplayCase("8 h each", 8 * 3600.0),
)


def row(case: ReplayCase, outcome: ReplayOutcome) -> list[str]:
    delays_s = sorted(outcome.delays_s)
    return [
        case.name,
        str(outcome.windows),
        f"{outcome.drifted / outcome.windows:.0%}",
        str(outcome.onsets),
        str(outcome.replans),
        str(outcome.proposals),
        str(outcome.in_first_day),
        str(outcome.withdrawn),
        f"{delays_s[len(delays_s) // 2] / 60:.0f} min" if delays_s and case.phase_s > WINDOW_S else "-",
        f"{min(outcome.gains):+.0%}" if outcome.gains else "-",
    ]


async def measure(streams: dict[str, RequestStream], hours: float, show_events: bool) -> None:
    planner = SplitPlanner([float(streams[kind].output_tokens.mean()) for kind in KINDS])
    plan = planner.best(SLO_FILE, 5.0)
    print(f"{MODEL} on {plan.num_devices} x {DEVICE}, {TP} for an instance; windows of {WINDOW_S:.0f} s, {hours:g} h")
    print(f"the plan for conversation: {plan.groups[0].instances} prefill, {plan.groups[1].instances} decode")
    rows = [
        [
            "PHASES",
            "WINDOWS",
            "DRIFTED",
            "ONSETS",
            "REPLANS",
            "PROPOSALS",
            "FIRST DAY",
            "WITHDRAWN",
            "DELAY",
            "LEAST GAIN",
        ]
    ]
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            outcome = await Replay(plan, planner, Path(folder)).run(traffic(case, streams, hours * 3600))
        rows.append(row(case, outcome))
        if show_events:
            print(f"\n{case.name}")
            print("\n".join(outcome.events))
    print()
    print("\n".join(text_table(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.replanning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_argument(parser, "traces/ (without them: lengths with Poisson arrivals)")
    parser.add_argument("--hours", type=float, default=48.0, help="virtual hours of each case (default 48)")
    parser.add_argument("--events", action="store_true", help="print every change of state")
    arguments = parser.parse_args()
    asyncio.run(measure(traces(arguments.data / "traces"), arguments.hours, arguments.events))


if __name__ == "__main__":
    main()
