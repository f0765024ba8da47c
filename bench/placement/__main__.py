"""How long does the placement search take, and how good are its plans?

distserve  OPT-13B and OPT-66B on 4 to 32 A100s, with the coefficients that DistServe (OSDI 2024) publishes and lengths
           with the means of its paper. Time of this search, and of DistServe's own in one process on a core of the same
           kind (measured earlier on its published code; not run here). The simulator evaluates both plans in steady
           state: requests per second and device that meet both targets, with a 95 % interval.
gpus       Llama-3.1-70B on 8 to 1,024 H100s (roofline): growth of the time with the cluster.
requests   OPT-13B on 32 A100s: growth with the requests of a simulation.
rate       the cheapest part of 32 A100s for a rate: growth with the rate.

Times are wall times of the search alone, without the simulations that a report adds. They need a quiet machine (its
load is printed first). The last line of the output is all of it as JSON.

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

from bench.common.distserve_costs import DEVICE, DistServeSource
from tandem.core.instance_section import RoleName
from tandem.core.parallel import ParallelShape
from tandem.core.slo import SloClass
from tandem.core.slo_file import ClusterSection, NodeSection, SearchSection, SloFile, WorkloadSection
from tandem.core.text_table import text_table
from tandem.placement.costs.cost_source import CostSource
from tandem.placement.planner import PlanResult, problem_of, search
from tandem.placement.search.candidate import CandidateDeployment, InstanceGroup
from tandem.placement.search.chosen_deployment import measure_goodput
from tandem.placement.search.kinds import phase_kind
from tandem.placement.search.mapper import Mapper, local_mapper
from tandem.placement.search.predict import Predictor
from tandem.placement.search.problem import Problem
from tandem.placement.search.trial import find_max_rate, scaled_down

PARTS = ("distserve", "gpus", "requests", "rate")
_AIM = 100  # times faster than DistServe's search
_GPUS = (8, 32, 128, 512, 1024)
_REQUESTS = (1000, 2000, 4000, 8000)
_RATES = (5.0, 20.0, 60.0)


@dataclass(frozen=True, slots=True)
class DistServeProblem:
    """A problem with the time and the result of DistServe's own search: (pp_cross, tp and pp of prefill, tp and pp of
    decode)."""

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


DISTSERVE_PROBLEMS = (
    DistServeProblem("OPT-13B", 1, 4, 0.2, 0.1, 25, (1, 2, 1, 1, 1)),
    DistServeProblem("OPT-13B", 1, 8, 0.25, 0.1, 163, (1, 4, 1, 1, 2)),
    DistServeProblem("OPT-13B", 4, 8, 0.2, 0.1, 872, (4, 4, 1, 1, 1)),
    DistServeProblem("OPT-66B", 1, 8, 0.4, 0.1, 64, (1, 4, 1, 2, 1)),
    DistServeProblem("OPT-66B", 4, 8, 2.5, 0.15, 308, (4, 3, 2, 2, 1)),
)


@dataclass(frozen=True, slots=True)
class DeploymentGoodput:
    """`goodput` and its interval are per device."""

    deployment: str
    devices: int
    goodput: float
    goodput_ci: tuple[float, float]


@dataclass(frozen=True, slots=True)
class SearchRow:
    """One search, and DistServe's own where it is known."""

    problem: str
    search_s: float
    simulations: int
    found: DeploymentGoodput | None
    distserve_search_s: float | None = None
    distserve_found: DeploymentGoodput | None = None


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
        search=SearchSection(
            layouts=("disaggregated",), node_affinity=affinity, max_pp=4, requests=requests, only_served=False
        ),
    )


def _search(
    name: str, slo_file: SloFile, source: CostSource | None, mapper: Mapper
) -> tuple[SearchRow, PlanResult, Problem]:
    def print_progress(share: float, text: str) -> None:
        print(f"\r{name}: {time.monotonic() - began_s:6.1f} s, {text[:90]:90}", end="", file=sys.stderr, flush=True)

    began_s = time.monotonic()
    problem = problem_of(slo_file, source)
    result = search(problem, mapper, print_progress)
    row = SearchRow(name, time.monotonic() - began_s, result.search.num_simulations, None)
    print(file=sys.stderr)
    return row, result, problem


def _evaluate(
    problem: Problem, deployment: CandidateDeployment, predictor: Predictor, mapper: Mapper
) -> DeploymentGoodput:
    """Of the whole deployment if it is small, else of a small one with the same proportions."""
    trial = scaled_down(deployment)
    scale = predictor.goodput(deployment) / predictor.goodput(trial)
    separate_nodes = trial != deployment
    rate = find_max_rate(problem, trial, predictor.goodput(trial), 0.0, mapper, separate_nodes=separate_nodes).rate
    measured = measure_goodput(problem, trial, rate, mapper, separate_nodes=separate_nodes)
    per_device = scale / deployment.num_devices
    low, high = measured.goodput_ci
    return DeploymentGoodput(
        str(deployment), deployment.num_devices, measured.goodput * per_device, (low * per_device, high * per_device)
    )


def _distserve_deployment(known: DistServeProblem, problem: Problem) -> CandidateDeployment:
    cross, *shape = known.config
    groups = []
    roles: tuple[RoleName, RoleName] = ("prefill", "decode")
    for role, (tp, pp) in zip(roles, (shape[:2], shape[2:]), strict=True):
        parallel = ParallelShape(tp, pp * cross)
        cost, tokens = problem.source.cost_model(DEVICE, parallel), problem.source.kv_tokens(DEVICE, parallel)
        assert cost is not None
        groups.append(InstanceGroup(phase_kind(role, DEVICE, parallel, cost, tokens, problem.computed), 1))
    return CandidateDeployment(tuple(groups), units=1, span=cross)


def _distserve(mapper: Mapper) -> list[SearchRow]:
    rows = []
    for known in DISTSERVE_PROBLEMS:
        slo = SloClass(ttft_s=known.ttft_s, tpot_s=known.tpot_s)
        slo_file = _slo_file(known.model, DEVICE, known.nodes, known.devices, slo, affinity="low")
        row, result, problem = _search(known.name, slo_file, DistServeSource(known.model), mapper)
        assert result.chosen is not None
        ours = _evaluate(problem, result.chosen.deployment, result.space.predictor, mapper)
        deployment = _distserve_deployment(known, problem)
        guess = ours.goodput * deployment.num_devices
        rate = find_max_rate(problem, deployment, guess, 0.0, mapper).rate
        measured = measure_goodput(problem, deployment, rate, mapper, separate_nodes=False)
        low, high = (end / deployment.num_devices for end in measured.goodput_ci)
        distserve_found = DeploymentGoodput(
            str(deployment), deployment.num_devices, measured.goodput / deployment.num_devices, (low, high)
        )
        rows.append(SearchRow(row.problem, row.search_s, row.simulations, ours, known.search_s, distserve_found))
    return rows


def _growth(part: str, mapper: Mapper) -> list[SearchRow]:
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


def _table(rows: Sequence[SearchRow]) -> list[str]:
    cells = [["PROBLEM", "SEARCH", "DISTSERVE'S", "TIMES", "SIMULATIONS", "GOODPUT/GPU", "OF DISTSERVE'S PLAN"]]
    for row in rows:
        distserve_s, times = row.distserve_search_s, ""
        if distserve_s is not None:
            times = f"{distserve_s / row.search_s:.0f}{'' if distserve_s / row.search_s >= _AIM else ' (missed)'}"
        cells.append(
            [
                row.problem,
                f"{row.search_s:.1f} s",
                "" if distserve_s is None else f"{distserve_s:g} s",
                times,
                str(row.simulations),
                _goodput(row.found),
                _goodput(row.distserve_found),
            ]
        )
    return text_table(cells)


def _goodput(found: DeploymentGoodput | None) -> str:
    if found is None:
        return ""
    low, high = found.goodput_ci
    return f"{found.goodput:.3g} ({low:.3g} to {high:.3g}) on {found.devices}"


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
                for searcher, found in (("Tandem", row.found), ("DistServe", row.distserve_found)):
                    if found is not None:
                        print(f"  {row.problem}, {searcher}: {found.deployment}")
    print(json.dumps(everything))


if __name__ == "__main__":
    main()
