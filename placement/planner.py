"""From an SLO file to a plan and its evidence.

The search (`placement.search`) finds the deployment. `placement.explanation` simulates it at rates around its goodput,
for the figures of the plan and their error.
"""

from contextlib import nullcontext
from dataclasses import dataclass

from tandem.core.slo_file import SloFile
from tandem.placement.cluster import Cluster
from tandem.placement.costs.cost_source import CostSource
from tandem.placement.costs.models import model_shape
from tandem.placement.costs.sources import cost_source_of
from tandem.placement.evidence import Planned
from tandem.placement.explanation import explain, explain_infeasible
from tandem.placement.search.best_first import EvaluatedDeployment, ReportProgress, SearchResult, find_best
from tandem.placement.search.cheapest import find_cheapest
from tandem.placement.search.mapper import Mapper, local_mapper
from tandem.placement.search.nearest_feasible import nearest_feasible
from tandem.placement.search.problem import Problem, without_cached
from tandem.placement.search.space import SearchSpace, search_space
from tandem.placement.search.trim import trimmed
from tandem.placement.workload.streams import make_stream

_SPARE_REQUESTS = 8  # ratio to `search.requests`, for runs that need more requests for a steady state
_SEARCH_SHARE = 0.6  # approximate share of the search in the planner's time


@dataclass(frozen=True, slots=True)
class PlanResult:
    """The result of `search`. `chosen` is None if no deployment can be planned. `met`: `chosen` solves the original
    problem; otherwise it solves the problem of `space`, which has the nearest feasible targets or rate."""

    space: SearchSpace
    search: SearchResult
    chosen: EvaluatedDeployment | None
    met: bool


def plan(
    slo_file: SloFile,
    *,
    progress: ReportProgress | None = None,
    workers: int = 0,
    mapper: Mapper | None = None,
    source: CostSource | None = None,
) -> Planned:
    """The best plan for the SLO file, or an infeasible plan with the nearest feasible targets.

    `workers`: number of processes, 0 for one per core. `mapper` executes the work elsewhere, e.g. on a Ray cluster.
    `source` replaces the costs of the SLO file. Deterministic for any number of workers. Raises ConfigError for
    mistakes in the SLO file.
    """
    report = progress or _silent
    problem = problem_of(slo_file, source)
    with nullcontext(mapper) if mapper is not None else local_mapper(workers) as spread:
        result = search(problem, spread, lambda share, text: report(_SEARCH_SHARE * share, text))
        if result.chosen is None:
            return explain_infeasible(slo_file, result.space)
        planned = explain(
            slo_file,
            result.space,
            result.search,
            result.chosen,
            spread,
            lambda share, text: report(_SEARCH_SHARE + (1 - _SEARCH_SHARE) * share, text),
            met=result.met,
        )
    report(1.0, "done")
    return planned


def problem_of(slo_file: SloFile, source: CostSource | None = None) -> Problem:
    """The problem of an SLO file, with generated requests. Raises ConfigError."""
    model = model_shape(slo_file.model)
    section, workload = slo_file.search, slo_file.workload
    requests = make_stream(
        workload, slo_file.slo, count=_SPARE_REQUESTS * section.requests, rate=1.0, seed=section.seed
    )
    return Problem(
        model=model,
        source=source or cost_source_of(slo_file, model),
        cluster=Cluster.of(slo_file.cluster),
        classes=slo_file.slo,
        section=section,
        requests=requests,
        computed=without_cached(requests).head(section.requests),
        rate=None if workload.rate == "max" else workload.rate,
        cheapest=slo_file.objective == "cheapest",
    )


def search(problem: Problem, mapper: Mapper, report: ReportProgress) -> PlanResult:
    """The deployment for the problem; if there is none, the deployment for the nearest feasible targets."""
    space = search_space(problem, mapper)
    if problem.cheapest:
        result = find_cheapest(space, mapper, report)
        if result.best is not None:
            return PlanResult(space, result, result.best, met=True)
    result = find_best(space, mapper, report)
    if result.best is not None:
        # `find_cheapest` does not enumerate all deployments; one of `find_best` may serve the rate.
        met = not problem.cheapest or problem.rate is None or (result.best.goodput or 0.0) >= problem.rate
        return PlanResult(space, result, trimmed(space, result.best), met=met)
    feasible = nearest_feasible(problem)
    if feasible is None:
        return PlanResult(space, result, None, met=False)
    space = search_space(feasible, mapper)
    result = find_best(space, mapper, report)
    return PlanResult(space, result, result.best, met=False)


def _silent(share: float, text: str) -> None:
    pass
