"""The cheapest fleet that serves a rate: DistServe's n = ceil(R / goodput), with prices, and verified.

Fleets begin with as many instances as their limits demand. The cheapest is looked at first: predicted, simulated at
the rate; where it falls short it comes back with one instance more in each of its pools in turn. The first that passes
is the answer, since all that are cheaper have failed, or their parts have.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from tandem.placement.judging.goodput import Evaluation
from tandem.placement.search.best_first import Found, Looked, Report, most_of
from tandem.placement.search.disaggregated import low_affinity
from tandem.placement.search.fleet import Fleet, Pool
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.search.parallel import Mapper
from tandem.placement.search.room import beside
from tandem.placement.search.space import Space
from tandem.placement.search.trial import Outcome, run, rung_below, trial_of

_GROWTH = 0.03  # of a pool's instances, at least one
_FLEETS_AT_ONCE = 16
_MOST_LOOKS = 4000
_FEWER = 2  # instances of a pool that colocated ones may stand in for
_MOST_MIXTURES = 128


@dataclass(order=True, slots=True)
class _Entry:
    """The cheapest first; of equal price the one that was named first."""

    price: float
    order: int
    fleet: Fleet = field(compare=False)


def find_cheapest(space: Space, mapper: Mapper, report: Report) -> Found:
    """For `space.problem.rate`. `best` None: not even the whole cluster serves it."""
    return _CheapestFirst(space, mapper, report).find()


class _CheapestFirst:
    def __init__(self, space: Space, mapper: Mapper, report: Report) -> None:
        assert space.problem.rate is not None
        self._space = space
        self._rate = space.problem.rate
        self._mapper = mapper
        self._report = report
        self._heap: list[_Entry] = []
        self._known: set[Fleet] = set()
        self._looked: list[Looked] = []
        self._simulations = 0

    def find(self) -> Found:
        best: Looked | None = None
        for fleet in self._least_fleets():
            self._push(fleet)
        while self._heap and best is None and len(self._looked) < _MOST_LOOKS:
            entries = [heapq.heappop(self._heap) for _ in range(min(_FLEETS_AT_ONCE, len(self._heap)))]
            self._space.predictor.prepare(entry.fleet for entry in entries)
            for place, entry in enumerate(entries):
                looked = self._look(entry.fleet)
                self._looked.append(looked)
                if looked.goodput:
                    best = looked
                    break
                # What is dearer than the fleets that grow out of this one has to wait for them.
                for fleet in self._larger(entry.fleet):
                    self._push(fleet)
                if self._heap and place + 1 < len(entries) and self._heap[0] < entries[place + 1]:
                    for later in entries[place + 1 :]:
                        heapq.heappush(self._heap, later)
                    break
        if best is not None and "mixed" in self._space.problem.section.layouts:
            best = self._mixture(best) or best
        return Found(best, tuple(self._looked), len(self._known), self._simulations)

    def _look(self, fleet: Fleet) -> Looked:
        predictor = self._space.predictor
        predicted = predictor.goodput(fleet)
        looked = Looked(fleet, predicted, min(predictor.limit(fleet), most_of(fleet, predicted)))
        if looked.bound < self._rate:
            return looked
        self._report(min(0.9, self._simulations / 20), f"simulating {fleet}")
        trial = trial_of(fleet)
        small = predictor.goodput(trial)
        rate = self._rate * (small / predicted if small > 0 else 1.0)
        _, judgement = run(self._space.problem, trial, rate, apart=trial != fleet)
        self._simulations += 1
        rung = rung_below(rate) if judgement.meets else None
        outcome = Outcome(rung, (Evaluation(rate, judgement),))
        return replace(looked, goodput=self._rate if judgement.meets else 0.0, outcome=outcome)

    def _mixture(self, best: Looked) -> Looked | None:
        """Cheaper than `best`, and passing; None if none is found among the cheapest."""
        fleets = sorted(self._mixtures(best.fleet), key=self._price)[:_MOST_MIXTURES]
        for begin in range(0, len(fleets), _FLEETS_AT_ONCE):
            batch = fleets[begin : begin + _FLEETS_AT_ONCE]
            self._known.update(batch)
            self._space.predictor.prepare(batch)
            for fleet in batch:
                looked = self._look(fleet)
                self._looked.append(looked)
                if looked.goodput:
                    return looked
        return None

    def _mixtures(self, fleet: Fleet) -> Iterator[Fleet]:
        """Cheaper than `fleet`, with as many colocated instances as the limits demand for what the rest cannot pass."""
        if fleet.layout != "disaggregated" or fleet.same_node:
            return
        price, predictor = self._price(fleet), self._space.predictor
        counts = (range(max(1, pool.instances - _FEWER), pool.instances + 1) for pool in fleet.pools)
        for instances in product(*counts):
            pools = tuple(Pool(pool.kind, count) for pool, count in zip(fleet.pools, instances, strict=True))
            missing = self._rate - predictor.limit(Fleet(pools))
            if missing <= 0:
                continue
            for kind in self._space.kinds.colocated:
                mixture = Fleet((*pools, self._least(kind, missing)))
                if self._price(mixture) < price and self._fits(mixture):
                    yield mixture

    def _price(self, fleet: Fleet) -> float:
        return self._space.problem.price_per_hour(fleet.devices)

    def _push(self, fleet: Fleet) -> None:
        if fleet not in self._known and self._fits(fleet):
            self._known.add(fleet)
            heapq.heappush(self._heap, _Entry(self._price(fleet), len(self._known), fleet))

    def _fits(self, fleet: Fleet) -> bool:
        nodes = self._space.problem.node_types
        if fleet.same_node:
            device = fleet.pools[0].kind.device
            per_node = fleet.num_devices // fleet.units // fleet.span
            room = sum(node.count for node in nodes if node.device == device and node.devices >= per_node)
            return fleet.units * fleet.span <= room
        return all(
            beside(nodes, fleet.pools[:index], pool.kind) >= pool.instances for index, pool in enumerate(fleet.pools)
        )

    def _least_fleets(self) -> Iterator[Fleet]:
        """Every combination of kinds, with as few instances as the limits allow."""
        kinds, section = self._space.kinds, self._space.problem.section
        if "disaggregated" in section.layouts:
            if self._space.allows_high_affinity:
                for prefill in kinds.prefill:
                    for decode in kinds.decode:
                        yield Fleet((self._least(prefill, self._rate), self._least(decode, self._rate)))
            if self._space.allows_low_affinity:
                for node in self._space.problem.node_types:
                    for span in range(1, node.count + 1):
                        for unit in low_affinity(kinds, [replace(node, count=span)]):
                            if unit.span == span:
                                passed = self._space.predictor.limit(unit)
                                yield _units(unit, max(1, math.ceil(self._rate / passed - 1e-9)))
        if "colocated" in section.layouts:
            yield from (Fleet((self._least(kind, self._rate),)) for kind in kinds.colocated)

    def _least(self, kind: InstanceKind, rate: float) -> Pool:
        """As few as the limit allows."""
        return Pool(kind, max(1, math.ceil(rate / self._space.limits[kind].rate - 1e-9)))

    def _larger(self, fleet: Fleet) -> Iterator[Fleet]:
        if fleet.same_node:
            yield _units(fleet, fleet.units + _more(fleet.units))
            return
        for index, pool in enumerate(fleet.pools):
            grown = Pool(pool.kind, pool.instances + _more(pool.instances))
            yield Fleet((*fleet.pools[:index], grown, *fleet.pools[index + 1 :]))


def _more(count: int) -> int:
    return max(1, round(_GROWTH * count))


def _units(fleet: Fleet, units: int) -> Fleet:
    pools = tuple(Pool(pool.kind, pool.instances // fleet.units * units) for pool in fleet.pools)
    return Fleet(pools, units=units, span=fleet.span)
