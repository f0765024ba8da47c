"""From an SLO file to a plan and its evidence.

The search (`placement.search`) finds the deployment. `placement.explanation` simulates it at rates around its goodput,
for the figures of the plan and their error.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

from tandem.core.slo_file import SloFile
from tandem.placement.cluster import Cluster
from tandem.placement.costs.cost_source import CostSource
from tandem.placement.costs.models import model_shape
from tandem.placement.costs.sources import cost_source_of
from tandem.placement.evidence import Planned
from tandem.placement.explanation import explain, explain_infeasible
from tandem.placement.search.best_first import EvaluatedDeployment, ReportProgress, SearchResult, find_best
from tandem.placement.search.cheapest import find_cheapest
from tandem.placement.search.final_comparison import Comparison, FinalComparison, compare_finalists
from tandem.placement.search.mapper import Mapper, SerialMapper, local_mapper
from tandem.placement.search.nearest_feasible import HEADROOMS, nearest_feasible
from tandem.placement.search.predict import limit_of_nodes
from tandem.placement.search.problem import Problem, cache_tokens_of, without_cached
from tandem.placement.search.rate_simulations import KnownEvaluations
from tandem.placement.search.space import SearchSpace, search_space
from tandem.placement.search.trim import trimmed
from tandem.placement.workload.streams import generated_requests, trace_requests
from tandem.placement.workload.windows import Window, windowed

_SPARE_REQUESTS = 8  # ratio to `search.requests`, for runs that need more requests for a steady state
_COMPARED_SHARE = 0.7  # approximate share of search and comparison in the planner's time
_SEARCH_SHARE = 0.5  # approximate share of the search in that
_LIMIT_REQUESTS = 128  # of a window, for its limit
_MAX_SEARCHES = 2  # for windows of a trace
_CLOSE = 0.95  # ratio of the goodput of all windows to that of the searched one from which one search is enough


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
    advice: bool = False,
) -> Planned:
    """The best plan for the SLO file, or an infeasible plan with the nearest feasible targets.

    `workers`: number of processes, 0 for one per core. `mapper` executes the work elsewhere, e.g. on a Ray cluster.
    `advice`: also predict changes that would help, in a few seconds.
    `source` replaces the costs of the SLO file. Deterministic for any number of workers. Raises ConfigError for
    mistakes in the SLO file.
    """
    report = progress or _silent
    problem = problem_of(slo_file, source)
    with nullcontext(mapper) if mapper is not None else local_mapper(workers) as spread:
        result, comparison = search_and_compare(
            problem, spread, lambda share, text: report(_COMPARED_SHARE * share, text)
        )
        if comparison is None:
            return explain_infeasible(slo_file, result.space)
        planned = explain(
            slo_file,
            result.space,
            comparison,
            result.search.num_simulations,
            spread,
            lambda share, text: report(_COMPARED_SHARE + (1 - _COMPARED_SHARE) * share, text),
            met=result.met,
            with_advice=advice,
        )
    report(1.0, "done")
    return planned


def search_and_compare(
    problem: Problem, mapper: Mapper, report: ReportProgress
) -> tuple[PlanResult, FinalComparison | None]:
    """The result of the search and the comparison of its best deployments; None if there is no deployment.

    For a trace the search is for one window, the comparison for all. If another window then limits what was found, and
    with much less goodput, the search is repeated for that window.
    """
    if not problem.windows:
        result = search(problem, mapper, partial(_report_part, report, 0.0, _SEARCH_SHARE))
        if result.chosen is None:
            return result, None
        compared = partial(_report_part, report, _SEARCH_SHARE, 1 - _SEARCH_SHARE)
        return result, compare_finalists(result.space, result.search.evaluated, result.chosen, mapper, compared)
    best: tuple[float, PlanResult, Comparison] | None = None
    tried: list[Window] = []
    known: KnownEvaluations = {}
    report(0.0, f"looking for the window that decides, of {len(problem.windows)}")
    window = _heaviest(problem, mapper)
    while True:
        begin = _SEARCH_SHARE * len(tried) / _MAX_SEARCHES
        tried.append(window)
        part = partial(_report_part, report, begin, _SEARCH_SHARE / _MAX_SEARCHES)
        result = _of_whole(search(problem.of_window(window), mapper, part), problem)
        if (chosen := result.chosen) is None:
            break
        compared = partial(_report_part, report, _SEARCH_SHARE, 1 - _SEARCH_SHARE)
        comparison = Comparison(result.space, mapper, compared, known)
        part(1.0, f"simulating {len(problem.windows)} windows")
        goodput, deciding = comparison.on_whole_trace(chosen)
        if best is None or goodput > best[0]:
            best = goodput, result, comparison
        is_close = goodput > _CLOSE * (chosen.goodput or 0.0)
        if deciding is None or deciding in tried or is_close or len(tried) == _MAX_SEARCHES:
            break
        window = deciding
    if best is None:
        return result, None
    _, result, comparison = best
    assert result.chosen is not None
    return result, comparison.of_finalists(result.search.evaluated, result.chosen)


def _of_whole(result: PlanResult, whole: Problem) -> PlanResult:
    """The result for a window of a trace, from here on for all windows."""
    problem = replace(result.space.problem, requests=whole.requests, windows=whole.windows)
    return replace(result, space=replace(result.space, problem=problem))


def _heaviest(problem: Problem, mapper: Mapper) -> Window:
    """The window that probably decides: of the windows by the rate that no deployment can exceed, the lowest last, the
    one with which they have the share `cover` of the time."""
    if len(problem.windows) == 1:
        return problem.windows[0]
    bounds = mapper(partial(_limit_in, problem), problem.windows)
    order = sorted(range(len(bounds)), key=lambda i: -bounds[i])
    covered = 0.0
    for i in order:
        covered += problem.windows[i].time_share
        if covered >= problem.cover - 1e-9:
            return problem.windows[i]
    return problem.windows[order[-1]]


def _limit_in(problem: Problem, window: Window) -> float:
    """Requests per second of the workload that no deployment can exceed in the window, by some of its requests."""
    space = search_space(problem.of_window(window).with_requests(_LIMIT_REQUESTS), SerialMapper())
    return limit_of_nodes(problem.node_types, space.limits)


def _report_part(report: ReportProgress, begin: float, length: float, share: float, text: str) -> None:
    report(begin + length * share, text)


def problem_of(slo_file: SloFile, source: CostSource | None = None) -> Problem:
    """The problem of an SLO file, with generated requests. Raises ConfigError."""
    model = model_shape(slo_file.model, slo_file.precision)
    section, workload = slo_file.search, slo_file.workload
    windows: tuple[Window, ...] = ()
    simulated_share = 1.0
    if workload.trace is not None:
        served = trace_requests(workload, slo_file.slo, seed=section.seed, max_context_tokens=model.max_context_tokens)
        divided = windowed(served.requests, section.requests)
        requests, windows = divided.stream, divided.windows
        simulated_share = divided.simulated_share
    else:
        served = generated_requests(
            workload,
            slo_file.slo,
            count=_SPARE_REQUESTS * section.requests,
            rate=1.0,
            seed=section.seed,
            max_context_tokens=model.max_context_tokens,
        )
        requests = served.requests
    source, cluster = source or cost_source_of(slo_file, model), Cluster.of(slo_file.cluster)
    cache_tokens = cache_tokens_of(cluster, source, model, section)
    return Problem(
        model=model,
        source=source,
        cluster=cluster,
        classes=slo_file.slo,
        section=section,
        requests=requests,
        computed=without_cached(requests, cache_tokens).head(section.requests),
        rate=None if workload.rate == "max" else workload.rate,
        cheapest=slo_file.objective == "cheapest",
        windows=windows,
        cover=workload.cover,
        simulated_share=simulated_share,
        notes=served.notes,
        cache_tokens=cache_tokens,
        kv_codec=slo_file.kv_codec,
    )


def search(problem: Problem, mapper: Mapper, report: ReportProgress) -> PlanResult:
    """The deployment for the problem; if there is none, the deployment for the nearest feasible targets. What is
    simulated from then on, in the space of the result, has the router that serves the plan."""
    result = _search(problem, mapper, report)
    return replace(result, space=replace(result.space, problem=result.space.problem.served()))


def _search(problem: Problem, mapper: Mapper, report: ReportProgress) -> PlanResult:
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
    for headroom in HEADROOMS:
        feasible = nearest_feasible(problem, headroom)
        if feasible is not None:
            space = search_space(feasible, mapper)
            result = find_best(space, mapper, report)
            if result.best is not None:
                break
    return PlanResult(space, result, result.best, met=False)


def _silent(share: float, text: str) -> None:
    pass
