"""Why a fleet lost, and what an answer means, in a sentence."""

from collections.abc import Iterable

from tandem.placement.evidence import Candidate
from tandem.placement.search.best_first import Looked
from tandem.placement.search.fleet import Fleet
from tandem.placement.search.kinds import InstanceKind, Kinds
from tandem.placement.search.limits import Limit
from tandem.placement.search.problem import Problem
from tandem.placement.search.space import Space

_MOST = 24


def candidates(space: Space, chosen: Looked, goodput: float, others: Iterable[Looked]) -> tuple[Candidate, ...]:
    """The best fleet of each combination of kinds beside the chosen one, in falling goodput per device; then the shapes
    that cannot serve at all."""
    problem = space.problem
    best: dict[tuple[InstanceKind, ...], Looked] = {}
    for looked in others:
        kinds = tuple(pool.kind for pool in looked.fleet.pools)
        if looked.fleet != chosen.fleet and (kinds not in best or _rank(looked) > _rank(best[kinds])):
            best[kinds] = looked
    listed = [_candidate(problem, looked, _reason(space, looked, chosen, goodput)) for looked in best.values()]
    listed.sort(key=lambda one: (-(one.goodput_per_device or 0.0), one.description))
    mine = Candidate(
        str(chosen.fleet),
        chosen.fleet.layout,
        chosen.fleet.num_devices,
        goodput=goodput,
        cost_per_hour=problem.cluster.price_per_hour(chosen.fleet.devices),
        chosen=True,
    )
    return (mine, *listed[:_MOST], *ruled_out(space.kinds, space.limits))


def ruled_out(kinds: Kinds, limits: dict[InstanceKind, Limit]) -> tuple[Candidate, ...]:
    """Shapes that no simulation was needed for."""
    shapes = [
        Candidate(f"{out.shape} on {out.device}", "disaggregated", out.shape.num_ranks, reason=out.reason)
        for out in kinds.ruled_out
    ]
    too_slow = [
        Candidate(
            f"{kind} on {kind.device}",
            "colocated" if kind.role == "colocated" else "disaggregated",
            kind.num_devices,
            reason=its.reason,
        )
        for kind, its in limits.items()
        if its.rate == 0
    ]
    return (*shapes, *too_slow)


def bottleneck(space: Space, fleet: Fleet) -> str:
    """Which phase of a fleet can pass the least, and what sets that. Colocated instances beside others hold nobody
    back."""
    passes: dict[str, list[tuple[float, str]]] = {}
    for pool in fleet.pools:
        if fleet.layout == "mixed" and pool.kind.role == "colocated":
            continue
        its = space.limits[pool.kind]
        passes.setdefault(pool.kind.role, []).append((pool.instances * its.rate, its.reason))
    least = min(passes, key=lambda role: sum(rate for rate, _ in passes[role]))
    return f"{least} ({passes[least][0][1]})"


def _rank(looked: Looked) -> tuple[float, float]:
    return (looked.goodput or 0.0, looked.predicted)


def _candidate(problem: Problem, looked: Looked, reason: str) -> Candidate:
    fleet = looked.fleet
    return Candidate(
        str(fleet),
        fleet.layout,
        fleet.num_devices,
        goodput=looked.goodput or None,
        cost_per_hour=problem.cluster.price_per_hour(fleet.devices),
        reason=reason,
    )


def _reason(space: Space, looked: Looked, chosen: Looked, goodput: float) -> str:
    held_back = f"its {bottleneck(space, looked.fleet)} holds it back"
    if looked.goodput:
        if looked.goodput >= goodput:
            is_larger = looked.fleet.num_devices > chosen.fleet.num_devices
            return "needs more devices for the same" if is_larger else "was not expected to serve as much"
        return f"{1 - looked.goodput / goodput:.0%} less goodput: {held_back}"
    if looked.goodput == 0.0:
        return f"misses its targets at the rate that the chosen one serves: {held_back}"
    return f"each phase alone promises {looked.predicted:.3g} req/s at most: {held_back}"
