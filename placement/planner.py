"""From an SLO file to a plan and the evidence for it.

The search (`placement.search`) finds the fleet; `placement.explanation` simulates it at rates around its goodput for
the figures that the plan states, and says how far they can be trusted.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from tandem.core.slo_file import SloFile
from tandem.placement.cluster import Cluster
from tandem.placement.costs.cost_source import CostSource
from tandem.placement.costs.models import model_shape
from tandem.placement.costs.sources import cost_source_of
from tandem.placement.evidence import Planned
from tandem.placement.explanation import explained, unanswered
from tandem.placement.search.best_first import Found, Looked, find_best
from tandem.placement.search.cheapest import find_cheapest
from tandem.placement.search.nearest import nearest_question
from tandem.placement.search.parallel import Mapper, local_mapper
from tandem.placement.search.problem import Problem, without_cached
from tandem.placement.search.space import Space, survey
from tandem.placement.search.trim import trimmed
from tandem.placement.workload.streams import make_stream

Progress = Callable[[float, str], None]

_SPARE_REQUESTS = 8  # times those asked for, where a run needs more to be long enough
_SEARCH_SHARE = 0.6  # of the time, about


@dataclass(frozen=True, slots=True)
class Answer:
    """What a search came to. `looked` None: nothing serves within the targets. `met`: it answers the question as asked,
    not the nearest one that has an answer."""

    space: Space
    found: Found
    looked: Looked | None
    met: bool


def plan(
    slo_file: SloFile,
    *,
    progress: Progress | None = None,
    workers: int = 0,
    mapper: Mapper | None = None,
    source: CostSource | None = None,
) -> Planned:
    """The best plan for the question, or an infeasible one with the nearest question that has an answer.

    `progress` is told the share that is done and what is being done. `workers` processes help, 0: one per core;
    `mapper` spreads the work elsewhere instead, a Ray cluster say. `source` replaces the file's costs. Deterministic,
    whoever helps. Raises ConfigError for what is wrong in the file.
    """
    report = progress or _silent
    problem = problem_of(slo_file, source)
    with nullcontext(mapper) if mapper is not None else local_mapper(workers) as spread:
        answer = search(problem, spread, lambda share, text: report(_SEARCH_SHARE * share, text))
        if answer.looked is None:
            return unanswered(slo_file, answer.space)
        planned = explained(
            slo_file,
            answer.space,
            answer.found,
            answer.looked,
            spread,
            lambda share, text: report(_SEARCH_SHARE + (1 - _SEARCH_SHARE) * share, text),
            met=answer.met,
        )
    report(1.0, "done")
    return planned


def problem_of(slo_file: SloFile, source: CostSource | None = None) -> Problem:
    """What the search needs of the file, with its requests drawn. Raises ConfigError."""
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


def search(problem: Problem, mapper: Mapper, report: Progress) -> Answer:
    """The fleet that answers; or, where none does, the one that answers the nearest question."""
    space = survey(problem, mapper)
    if problem.cheapest:
        found = find_cheapest(space, mapper, report)
        if found.best is not None:
            return Answer(space, found, found.best, met=True)
    found = find_best(space, mapper, report)
    if found.best is not None:
        # Of the cheapest not every sort of fleet is tried; here one may serve the rate all the same.
        met = not problem.cheapest or problem.rate is None or (found.best.goodput or 0.0) >= problem.rate
        return Answer(space, found, trimmed(space, found.best), met=met)
    nearest = nearest_question(problem)
    if nearest is None:
        return Answer(space, found, None, met=False)
    space = survey(nearest, mapper)
    found = find_best(space, mapper, report)
    return Answer(space, found, found.best, met=False)


def _silent(share: float, text: str) -> None:
    pass
