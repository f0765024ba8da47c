"""The fleet of the highest goodput, by best-first branch and bound.

    part of the cluster     bound: the linear programme of `predict.limit_of_nodes`
       |  its fleets, named by `disaggregated`, `colocated`, `mixed` and `heterogeneous`, and its own parts, one node or
       |  one device per node smaller
    fleet                   bound: the limits of its pools and links
       |  curves of each phase alone, computed for all fleets near the top at once
    fleet with prediction   bound: the prediction and a margin, but never more than the limit
       |  full simulations
    goodput                 the highest rung of the ladder that passed, but never more than the bound

Whatever has the highest bound is looked at next; when no bound beats the best goodput found, that is the best of all.
So the answer is the maximum, over all fleets of all parts of the cluster, of a number that depends on the fleet alone.
A larger cluster has all the parts of a smaller one: more devices never lower the answer. How many processes help, and
when, does not change it either. (Where predictions are far too high, simulations would have to rule out half of all
fleets; the search gives up after a dozen in a row that did not beat the best.)
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from tandem.placement.search.fleet import Fleet
from tandem.placement.search.parallel import Mapper
from tandem.placement.search.predict import limit_of_nodes
from tandem.placement.search.problem import NodeType, Problem
from tandem.placement.search.space import Space
from tandem.placement.search.trial import LADDER_STEP, Outcome, climb, trial_of

_MARGIN = 1.05  # by which a simulation may exceed the prediction
_COLOCATED_MARGIN = 1.1  # with colocated instances: their model is rougher, and it knows no parts that relieve others
_FLEETS_AT_ONCE = 48
_MOST_FAILURES = 12  # fleets in a row that were simulated and did not beat the best

Report = Callable[[float, str], None]
Nodes = tuple[NodeType, ...]


@dataclass(frozen=True, slots=True)
class Looked:
    """A fleet with its prediction. `goodput` None: it was not simulated, its bound being too low already; 0: it was,
    and did not pass where it would have become the best."""

    fleet: Fleet
    predicted: float
    bound: float
    goodput: float | None = None
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """`best` None: no fleet serves anything within the targets. `looked`: in the order of looking."""

    best: Looked | None
    looked: tuple[Looked, ...]
    num_fleets: int
    num_simulations: int


@dataclass(order=True, slots=True)
class _Entry:
    """The highest bound first; of equal ones the highest prediction, then the fewest devices, then the one named
    first."""

    negative_bound: float
    negative_prediction: float
    num_devices: int
    order: int
    subject: Nodes | Fleet | Looked = field(compare=False)


def find_best(space: Space, mapper: Mapper, report: Report) -> Found:
    """`report` is called with the share of the bounds' gap that is closed, and what is done now."""
    return _BestFirst(space, mapper, report).find()


class _BestFirst:
    def __init__(self, space: Space, mapper: Mapper, report: Report) -> None:
        self._space = space
        self._mapper = mapper
        self._report = report
        self._heap: list[_Entry] = []
        self._best: Looked | None = None
        self._looked: list[Looked] = []
        self._parts: set[Nodes] = set()
        self._named = 0
        self._simulations = 0
        self._failures = 0

    def find(self) -> Found:
        self._add_part(self._space.problem.node_types)
        while self._heap and self._bound() > self._to_beat() and self._failures < _MOST_FAILURES:
            subject = self._heap[0].subject
            if isinstance(subject, Fleet):
                self._predict(self._pop(Fleet, _FLEETS_AT_ONCE))
            elif isinstance(subject, Looked):
                self._try(self._pop(Looked, 1 if self._best is None else self._mapper.workers))
            else:
                self._open(self._pop(tuple, 1)[0])
        self._looked += [entry.subject for entry in self._heap if isinstance(entry.subject, Looked)]
        self._looked += self._best_of_other_layouts()
        return Found(self._best, tuple(self._looked), self._named, self._simulations)

    def _best_of_other_layouts(self) -> list[Looked]:
        """Of layouts whose bound was too low for a prediction: what a reader wants to see the answer beside."""
        firsts: dict[str, Fleet] = {}
        for entry in sorted(self._heap):
            if isinstance(entry.subject, Fleet):
                firsts.setdefault(entry.subject.layout, entry.subject)
        seen = {looked.fleet.layout for looked in self._looked}
        fleets = [fleet for layout, fleet in firsts.items() if layout not in seen]
        predictor = self._space.predictor
        predictor.prepare(fleets)
        return [Looked(fleet, predictor.goodput(fleet), predictor.limit(fleet)) for fleet in fleets]

    def _bound(self) -> float:
        return -self._heap[0].negative_bound

    def _to_beat(self) -> float:
        """Less than a rung of the ladder is no improvement."""
        return 0.0 if self._best is None else (self._best.goodput or 0.0) * LADDER_STEP

    def _push(self, bound: float, num_devices: int, subject: Nodes | Fleet | Looked) -> None:
        if bound > self._to_beat():
            prediction = subject.predicted if isinstance(subject, Looked) else bound
            heapq.heappush(self._heap, _Entry(-bound, -prediction, num_devices, self._named, subject))

    def _pop(self, sort: type, most: int) -> list[_Entry]:
        """The first entry and those of its sort among the next, as long as their bounds are still worth it."""
        taken: list[_Entry] = []
        while self._heap and len(taken) < most and isinstance(self._heap[0].subject, sort):
            if self._bound() <= self._to_beat():
                break
            taken.append(heapq.heappop(self._heap))
        return taken

    def _add_part(self, nodes: Nodes) -> None:
        if nodes and nodes not in self._parts:
            self._parts.add(nodes)
            self._push(limit_of_nodes(nodes, self._space.limits), sum(node.num_devices for node in nodes), nodes)

    def _open(self, entry: _Entry) -> None:
        """Name the fleets of a part of the cluster, and its own parts."""
        nodes = entry.subject
        assert isinstance(nodes, tuple)
        self._report(self._closed(), f"naming fleets on {entry.num_devices} devices")
        for fleet in self._space.fleets(nodes):
            self._named += 1
            self._push(self._space.predictor.limit(fleet), fleet.num_devices, fleet)
        for index, node in enumerate(nodes):
            for smaller in (replace(node, count=node.count - 1), replace(node, devices=node.devices - 1)):
                kept = (smaller,) if smaller.num_devices else ()
                self._add_part((*nodes[:index], *kept, *nodes[index + 1 :]))

    def _predict(self, entries: list[_Entry]) -> None:
        predictor = self._space.predictor
        fleets = [entry.subject for entry in entries if isinstance(entry.subject, Fleet)]
        self._report(self._closed(), f"each phase alone, {predictor.num_curves} curves so far")
        predictor.prepare(fleets)
        for entry, fleet in zip(entries, fleets, strict=True):
            predicted = predictor.goodput(fleet)
            bound = min(-entry.negative_bound, most_of(fleet, predicted))
            self._push(bound, fleet.num_devices, Looked(fleet, predicted, bound))

    def _try(self, entries: list[_Entry]) -> None:
        prospects = [entry.subject for entry in entries if isinstance(entry.subject, Looked)]
        self._report(self._closed(), f"simulating {prospects[0].fleet}")
        best = 0.0 if self._best is None else self._best.goodput or 0.0
        tasks = [task_for(self._space, prospect, best) for prospect in prospects]
        if len(tasks) == 1:
            outcomes = [climb_of(self._space.problem, tasks[0], self._mapper)]
        else:
            outcomes = self._mapper(partial(climb_of, self._space.problem), tasks)
        for prospect, task, outcome in zip(prospects, tasks, outcomes, strict=True):
            self._simulations += len(outcome.evaluations)
            goodput = min(outcome.rate * task.scale, prospect.bound)
            looked = replace(prospect, goodput=goodput, outcome=outcome)
            self._looked.append(looked)
            self._failures += 1
            if goodput > best:
                self._best, self._failures, best = looked, 0, goodput

    def _closed(self) -> float:
        """How near the best goodput is to the highest bound, 0 to 1."""
        if self._best is None or not self._heap:
            return 0.0
        return min(1.0, (self._best.goodput or 0.0) / self._bound())


def most_of(fleet: Fleet, predicted: float) -> float:
    """Requests per second that a simulation of it may pass, as far as the prediction can be trusted."""
    return predicted * (_MARGIN if fleet.layout == "disaggregated" else _COLOCATED_MARGIN)


@dataclass(frozen=True, slots=True)
class Task:
    """The climb of a fleet's trial, in the trial's rates. `scale`: what the fleet passes for each request per second of
    the trial."""

    trial: Fleet
    guess: float
    at_least: float
    scale: float
    apart: bool


def task_for(space: Space, prospect: Looked, best: float = 0.0) -> Task:
    """It gives up where the prospect cannot have more than `best`."""
    trial = trial_of(prospect.fleet)
    small = space.predictor.goodput(trial)
    scale = prospect.predicted / small if small > 0 else 1.0
    return Task(trial, prospect.predicted / scale, best / scale, scale, apart=trial != prospect.fleet)


def climb_of(problem: Problem, task: Task, mapper: Mapper | None = None) -> Outcome:
    return climb(problem, task.trial, task.guess, task.at_least, mapper, apart=task.apart)
