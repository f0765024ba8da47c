"""How long the placement search takes, and what its plans are worth.

distserve  OPT-13B and OPT-66B on 4 to 32 A100s, with the coefficients that DistServe (OSDI 2024) publishes and lengths
           of the means that its paper gives: time of this search, and of DistServe's own, one process on a core of the
           same kind (measured earlier on its code as published; not run here). Both plans are judged by the simulator
           here, in steady state: requests per second and device that keep both targets, with a 95 % interval.
gpus       Llama-3.1-70B on 8 to 1,024 H100s (roofline): how the time grows with the cluster.
requests   OPT-13B on 32 A100s: how it grows with the requests of a simulation.
rate       the cheapest part of 32 A100s for a rate: how it grows with the rate.

Times are wall times of the search alone, without the simulations that a report adds; they need a quiet machine (see the
load that is printed first). The last line of the output is all of it as JSON.

    python -m bench.placement                      everything, some minutes
    python -m bench.placement --part distserve     one part
    python -m bench.placement --workers 1          on one core
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

from tandem.core.parallel import ParallelShape
from tandem.core.slo import SloClass
from tandem.core.slo_file import ClusterSection, NodeSection, SearchSection, SloFile, WorkloadSection
from tandem.core.text_table import text_table
from tandem.placement.costs.cost_source import CostSource
from tandem.placement.costs.published import DEVICE, DistServeSource
from tandem.placement.planner import PlanResult, problem_of, search
from tandem.placement.search.candidate import CandidateDeployment, InstanceGroup
from tandem.placement.search.chosen_deployment import measure_goodput
from tandem.placement.search.kinds import phase_kind
from tandem.placement.search.mapper import Mapper, local_mapper
from tandem.placement.search.predict import Predictor
from tandem.placement.search.problem import Problem
from tandem.placement.search.trial import scaled_down
from tandem.placement.simulator.deployment import Role

PARTS = ("distserve", "gpus", "requests", "rate")
_AIM = 100  # times faster than DistServe's search
_GPUS = (8, 32, 128, 512, 1024)
_REQUESTS = (1000, 2000, 4000, 8000)
_RATES = (5.0, 20.0, 60.0)


@dataclass(frozen=True, slots=True)
class Known:
    """A problem that DistServe's search was run on: seconds it took, and its answer as (pp_cross, tp and pp of prefill,
    tp and pp of decode)."""

    model: str
    nodes: int
    devices: int
    ttft_s: float
    tpot_s: float
    search_s: float
    config: tuple[int, int, int, int, int]

    @property
    def name(self) -> str:
        return f"{self.model} {self.nodes}x{self.devices}, {self.ttft_s * 1e3:g}/{self.tpot_s * 1e3:g} ms"


KNOWN = (
    Known("OPT-13B", 1, 4, 0.2, 0.1, 25, (1, 2, 1, 1, 1)),
    Known("OPT-13B", 1, 8, 0.25, 0.1, 163, (1, 4, 1, 1, 2)),
    Known("OPT-13B", 4, 8, 0.2, 0.1, 872, (4, 4, 1, 1, 1)),
    Known("OPT-66B", 1, 8, 0.4, 0.1, 64, (1, 4, 1, 2, 1)),
    Known("OPT-66B", 4, 8, 2.5, 0.15, 308, (4, 3, 2, 2, 1)),
)


@dataclass(frozen=True, slots=True)
class Judged:
    """`goodput` and its interval are per device."""

    deployment: str
    devices: int
    goodput: float
    goodput_ci: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One search."""

    problem: str
    search_s: float
    simulations: int
    found: Judged | None
    their_search_s: float | None = None
    theirs: Judged | None = None


def _slo_file(
    model: str,
    device: str,
    nodes: int,
    devices: int,
    slo: SloClass,
    *,
    requests: int = 2000,
    rate: float | None = None,
    affinity: Literal["auto", "low"] = "auto",
) -> SloFile:
    return SloFile(
        model=model,
        cluster=ClusterSection(nodes=(NodeSection(device=device, devices=devices, count=nodes),)),
        slo=(slo,),
        workload=WorkloadSection(dataset="distserve_sharegpt", rate="max" if rate is None else rate),
        objective="goodput" if rate is None else "cheapest",
        search=SearchSection(layouts=("disaggregated",), node_affinity=affinity, max_pp=4, requests=requests),
    )


def _search(name: str, slo_file: SloFile, source: CostSource | None, mapper: Mapper) -> tuple[Row, PlanResult, Problem]:
    def tell(share: float, text: str) -> None:
        print(f"\r{name}: {time.monotonic() - begun_s:6.1f} s, {text[:90]:90}", end="", file=sys.stderr, flush=True)

    begun_s = time.monotonic()
    problem = problem_of(slo_file, source)
    result = search(problem, mapper, tell)
    row = Row(name, time.monotonic() - begun_s, result.search.num_simulations, None)
    print(file=sys.stderr)
    return row, result, problem


def _judge(problem: Problem, deployment: CandidateDeployment, predictor: Predictor, mapper: Mapper) -> Judged:
    """In full where the deployment is small, else on a small one of its proportions."""
    trial = scaled_down(deployment)
    scale = predictor.goodput(deployment) / predictor.goodput(trial)
    measured = measure_goodput(problem, trial, predictor.goodput(trial), mapper, separate_nodes=trial != deployment)
    per_device = scale / deployment.num_devices
    low, high = measured.goodput_ci
    return Judged(
        str(deployment), deployment.num_devices, measured.goodput * per_device, (low * per_device, high * per_device)
    )


def _their_deployment(known: Known, problem: Problem) -> CandidateDeployment:
    cross, *shape = known.config
    groups = []
    roles: tuple[Role, Role] = ("prefill", "decode")
    for role, (tp, pp) in zip(roles, (shape[:2], shape[2:]), strict=True):
        parallel = ParallelShape(tp, pp * cross)
        cost, tokens = problem.source.cost_model(DEVICE, parallel), problem.source.kv_tokens(DEVICE, parallel)
        assert cost is not None
        groups.append(InstanceGroup(phase_kind(role, DEVICE, parallel, cost, tokens, problem.computed), 1))
    return CandidateDeployment(tuple(groups), units=1, span=cross)


def _distserve(mapper: Mapper) -> list[Row]:
    rows = []
    for known in KNOWN:
        slo = SloClass(ttft_s=known.ttft_s, tpot_s=known.tpot_s)
        slo_file = _slo_file(known.model, DEVICE, known.nodes, known.devices, slo, affinity="low")
        row, result, problem = _search(known.name, slo_file, DistServeSource(known.model), mapper)
        assert result.chosen is not None
        ours = _judge(problem, result.chosen.deployment, result.space.predictor, mapper)
        deployment = _their_deployment(known, problem)
        measured = measure_goodput(
            problem, deployment, ours.goodput * deployment.num_devices, mapper, separate_nodes=False
        )
        low, high = (end / deployment.num_devices for end in measured.goodput_ci)
        theirs = Judged(str(deployment), deployment.num_devices, measured.goodput / deployment.num_devices, (low, high))
        rows.append(Row(row.problem, row.search_s, row.simulations, ours, known.search_s, theirs))
    return rows


def _growth(part: str, mapper: Mapper) -> list[Row]:
    if part == "gpus":
        slo = SloClass(ttft_s=1.0, tpot_s=0.05)
        files = {f"{n} GPUs": _slo_file("Llama-3.1-70B", "H100-80GB-SXM5", n // 8, 8, slo) for n in _GPUS}
        return [_search(name, slo_file, None, mapper)[0] for name, slo_file in files.items()]
    slo = SloClass(ttft_s=0.2, tpot_s=0.1)
    opt = partial(_slo_file, "OPT-13B", DEVICE, 4, 8, slo, affinity="low")
    if part == "requests":
        files = {f"{n} requests": opt(requests=n) for n in _REQUESTS}
    else:
        files = {f"{rate:g} requests/s": opt(rate=rate) for rate in _RATES}
    return [_search(name, slo_file, DistServeSource("OPT-13B"), mapper)[0] for name, slo_file in files.items()]


def _table(rows: Sequence[Row]) -> list[str]:
    cells = [["PROBLEM", "SEARCH", "DISTSERVE'S", "TIMES", "SIMULATIONS", "GOODPUT/GPU", "OF DISTSERVE'S PLAN"]]
    for row in rows:
        theirs = row.their_search_s
        times = (
            ""
            if theirs is None
            else f"{theirs / row.search_s:.0f}{'' if theirs / row.search_s >= _AIM else ' (missed)'}"
        )
        cells.append(
            [
                row.problem,
                f"{row.search_s:.1f} s",
                "" if theirs is None else f"{theirs:g} s",
                times,
                str(row.simulations),
                _goodput(row.found),
                _goodput(row.theirs),
            ]
        )
    return text_table(cells)


def _goodput(judged: Judged | None) -> str:
    if judged is None:
        return ""
    low, high = judged.goodput_ci
    return f"{judged.goodput:.3g} ({low:.3g} to {high:.3g}) on {judged.devices}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.placement", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given several times")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one per core)")
    args = parser.parse_args(arguments)
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    everything: dict[str, list[dict[str, object]]] = {}
    with local_mapper(args.workers) as mapper:
        for part in args.part or PARTS:
            rows = _distserve(mapper) if part == "distserve" else _growth(part, mapper)
            everything[part] = [asdict(row) for row in rows]
            print(f"\n{part}", *_table(rows), sep="\n")
            for row in rows:
                for whose, judged in (("ours", row.found), ("DistServe's", row.theirs)):
                    if judged is not None:
                        print(f"  {row.problem}, {whose}: {judged.deployment}")
    print(json.dumps(everything))


if __name__ == "__main__":
    main()
