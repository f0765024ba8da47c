"""Goodput of the best fleets that were not chosen, so that a report can say by how much they lost."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from tandem.placement.search.best_first import Looked, climb_of, task_for
from tandem.placement.search.fleet import Fleet
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.search.parallel import Mapper
from tandem.placement.search.space import Space

_COUNT = 3


def with_runners_up(space: Space, looked: Sequence[Looked], chosen: Fleet, mapper: Mapper) -> tuple[Looked, ...]:
    """`looked`, of which the best of every layout and some more have been simulated until they passed."""
    runners = _runners(looked, chosen)
    tasks = [task_for(space, runner) for runner in runners]
    outcomes = mapper(partial(climb_of, space.problem), tasks)
    known = {
        runner.fleet: replace(runner, goodput=outcome.rate * task.scale, outcome=outcome)
        for runner, task, outcome in zip(runners, tasks, outcomes, strict=True)
    }
    return tuple(known.get(one.fleet, one) for one in looked)


def _runners(looked: Sequence[Looked], chosen: Fleet) -> list[Looked]:
    """One fleet of each combination of kinds; first the best of each layout, then the best of what is left."""
    seen: set[tuple[InstanceKind, ...]] = {tuple(pool.kind for pool in chosen.pools)}
    ranked: list[Looked] = []
    for one in sorted(looked, key=lambda one: -one.predicted):
        kinds = tuple(pool.kind for pool in one.fleet.pools)
        if kinds not in seen and one.predicted > 0:
            seen.add(kinds)
            ranked.append(one)
    firsts = {one.fleet.layout: one for one in reversed(ranked)}
    rest = [one for one in ranked if one not in firsts.values()]
    return [one for one in (*firsts.values(), *rest) if one.fleet != chosen and not one.goodput][:_COUNT]
