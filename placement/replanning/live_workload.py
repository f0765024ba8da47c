"""From a window of live requests to a question for the planner: the SLO file as it was, with the workload as it is.

The question is a folder that anybody can look at, and answer again with `tandem plan`: slo.yaml with workload.csv.
Beside it is the plan that runs, made for other requests.
"""

import csv
from pathlib import Path

import numpy as np

from tandem.core.config_file import dump_config
from tandem.core.errors import ConfigError
from tandem.core.plan import Plan
from tandem.core.slo_file import PrefixSection, SloFile, WorkloadSection
from tandem.core.workload_profile import ProfileSnapshot
from tandem.placement.replanning.workload_distance import Workload
from tandem.placement.workload.requests import Floats
from tandem.placement.workload.streams import make_stream

SPARE_REQUESTS = 8  # times `search.requests`: simulations take more where few do not show a steady state
QUESTION = "slo.yaml"
RUNNING_PLAN = "running_plan.yaml"


def planned_workload(plan: Plan, slo_file: SloFile) -> Workload:
    """What the plan was made for. Raises ConfigError where nobody says for which rate."""
    rate = plan.expected.rate if plan.expected else slo_file.workload.rate
    if rate == "max":
        raise ConfigError("the plan names no rate, and its SLO file's workload.rate is max")
    stream = make_stream(
        slo_file.workload, slo_file.slo, count=slo_file.search.requests, rate=rate, seed=slo_file.search.seed
    )
    return Workload.planned(stream, rate)


def write_question(folder: Path, running: Plan, slo_file: SloFile, snapshot: ProfileSnapshot) -> None:
    """Make `folder`, which must be new, with the three files. Raises OSError.

    Arrivals are the kept ones, over and over if the planner's simulations take more; sampled lengths come in random
    order. What the prefix cache had becomes one common prefix of mean length, in as many requests as had some.
    """
    folder.mkdir()
    trace = (folder / "workload.csv").resolve()
    _write_trace(trace, slo_file, snapshot)
    question = slo_file.model_copy(update={"workload": _live_section(slo_file, snapshot, trace)})
    (folder / QUESTION).write_text(dump_config(question))
    (folder / RUNNING_PLAN).write_text(dump_config(running))


def _live_section(slo_file: SloFile, snapshot: ProfileSnapshot, trace: Path) -> WorkloadSection:
    """The planner finds the highest rate where it was asked for that; else the window's rate is the one to serve."""
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
    has_classes = any(snapshot.slo_class)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["arrival_s", "prompt_tokens", "output_tokens", *(["slo_class"] if has_classes else [])])
        for at_s, place in zip(arrival_s, order, strict=True):
            row = [f"{at_s:.6f}", snapshot.prompt_tokens[place], snapshot.output_tokens[place]]
            rows.writerow([*row, slo_file.slo[snapshot.slo_class[place]].name] if has_classes else row)


def _arrivals(snapshot: ProfileSnapshot, count: int) -> Floats:
    kept_s = np.array(snapshot.arrival_s or (0.0,))
    rounds = np.arange(-(-count // len(kept_s)))
    arrival_s: Floats = (rounds[:, None] * snapshot.kept_s + kept_s).ravel()[:count]
    return arrival_s
