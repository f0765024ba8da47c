"""The planner's input for a window of live requests: the plan's SLO file with the live workload.

The input is a folder with slo.yaml, workload.csv and the running plan. `tandem plan` can read its slo.yaml, too.
"""

import csv
from pathlib import Path

import numpy as np

from tandem.core.config_file import dump_config
from tandem.core.errors import ConfigError
from tandem.core.plan import Plan
from tandem.core.slo_file import PrefixSection, SloFile, WorkloadSection
from tandem.core.workload_profile import ProfileSnapshot
from tandem.placement.replanning.workload_distance import WorkloadStats
from tandem.placement.workload.requests import Floats
from tandem.placement.workload.streams import make_stream, trace_requests

SPARE_REQUESTS = 8  # ratio to `search.requests`, for simulations that need more requests for a steady state
SLO_FILE_NAME = "slo.yaml"
RUNNING_PLAN_NAME = "running_plan.yaml"


def planned_workload(plan: Plan, slo_file: SloFile) -> WorkloadStats:
    """The workload of the plan, of a trace all of it. Raises ConfigError if its rate is unknown."""
    rate = plan.expected.rate if plan.expected else slo_file.workload.rate
    if rate == "max":
        raise ConfigError("the plan has no rate and its SLO file's workload.rate is max; set workload.rate")
    workload, seed = slo_file.workload, slo_file.search.seed
    if workload.trace is not None:
        return WorkloadStats.planned(trace_requests(workload, slo_file.slo, seed=seed).requests, rate)
    stream = make_stream(workload, slo_file.slo, count=slo_file.search.requests, rate=rate, seed=seed)
    return WorkloadStats.planned(stream, rate)


def write_replan_input(folder: Path, running: Plan, slo_file: SloFile, snapshot: ProfileSnapshot) -> None:
    """Create `folder`, which must not exist, with the three files. Raises OSError.

    The trace repeats the kept arrivals as often as the planner's simulations need; sampled lengths are in random order.
    Cached tokens become one common prefix of mean length, in the same share of the requests.
    """
    folder.mkdir(parents=True)
    trace = (folder / "workload.csv").resolve()
    _write_trace(trace, slo_file, snapshot)
    live = slo_file.model_copy(update={"workload": _live_section(slo_file, snapshot, trace)})
    (folder / SLO_FILE_NAME).write_text(dump_config(live), encoding="utf-8")
    (folder / RUNNING_PLAN_NAME).write_text(dump_config(running), encoding="utf-8")


def _live_section(slo_file: SloFile, snapshot: ProfileSnapshot, trace: Path) -> WorkloadSection:
    """The workload section with the rate max if the SLO file has max, otherwise with the window's rate."""
    cached = [tokens for tokens in snapshot.cached_tokens if tokens > 0]
    prefix = None
    if cached:
        share = len(cached) / len(snapshot.cached_tokens)
        prefix = PrefixSection(share=share, tokens=round(sum(cached) / len(cached)))
    rate = "max" if slo_file.workload.rate == "max" else snapshot.rate
    return WorkloadSection.model_validate({"trace": trace, "rate": rate, "prefix": prefix})


def _write_trace(path: Path, slo_file: SloFile, snapshot: ProfileSnapshot) -> None:
    rng = np.random.default_rng(slo_file.search.seed)
    size = len(snapshot.prompt_tokens)
    count = SPARE_REQUESTS * slo_file.search.requests
    order = np.concatenate([rng.permutation(size) for _ in range(-(-count // size))])[:count]
    arrival_s = _arrivals(snapshot, len(order))
    # A router may serve classes beside those of the plan; these count as of the first one.
    names = [slo_file.slo[index if index < len(slo_file.slo) else 0].name for index in snapshot.slo_class]
    has_classes = any(snapshot.slo_class)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["arrival_s", "prompt_tokens", "output_tokens", *(["slo_class"] if has_classes else [])])
        for at_s, index in zip(arrival_s, order, strict=True):
            row = [f"{at_s:.6f}", snapshot.prompt_tokens[index], snapshot.output_tokens[index]]
            rows.writerow([*row, names[index]] if has_classes else row)


def _arrivals(snapshot: ProfileSnapshot, count: int) -> Floats:
    kept_s = np.array(snapshot.arrival_s or (0.0,))
    rounds = np.arange(-(-count // len(kept_s)))
    arrival_s: Floats = (rounds[:, None] * snapshot.kept_s + kept_s).ravel()[:count]
    return arrival_s
