"""The deployment of the highest goodput, by best-first branch and bound.

    part of the cluster         bound: the linear programme of `predict.limit_of_nodes`
       |  its candidate deployments, and its own parts: one node less, or one device per node less
    deployment                  bound: the limits of its groups and links
       |  attainments of its groups, computed in batches
    deployment with prediction  bound: the prediction plus a margin, at most the limit
       |  full simulations
    goodput                     the highest rate that meets the targets, at most the bound

The item with the highest bound is next. The search ends when no bound exceeds the best goodput. So the result is the
maximum, over all deployments on all parts of the cluster, of a number that depends only on the deployment. A larger
cluster has all parts of a smaller cluster, so more devices never lower the result. The number of workers does not
change the result. If predictions are far too high, the search gives up after a dozen consecutive deployments without
improvement.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.mapper import Mapper
from tandem.placement.search.predict import limit_of_nodes
from tandem.placement.search.problem import NodeType, Problem
from tandem.placement.search.space import SearchSpace
from tandem.placement.search.trial import RATE_RATIO, MaxRate, find_max_rate, scaled_down

_MARGIN = 1.05  # ratio by which a simulation may exceed the prediction
_COLOCATED_MARGIN = 1.1  # with colocated instances: their model is less accurate and ignores that groups share load
_BATCH = 48
_MAX_FAILURES = 12  # consecutive simulated deployments without improvement
_PART = 0.03  # of the rest, for the progress
_MAX_DONE = 0.9  # of the progress, while there is work left

ReportProgress = Callable[[float, str], None]
"""Receives the share of the work that is done, and a phrase about the current work."""
Nodes = tuple[NodeType, ...]


@dataclass(frozen=True, slots=True)
class EvaluatedDeployment:
    """A deployment with its prediction. `goodput` is None without simulation (the bound was too low), and 0 if the
    deployment misses the targets at the rates above the best goodput."""

    deployment: CandidateDeployment
    predicted: float
    bound: float
    goodput: float | None = None


@dataclass(frozen=True, slots=True)
class SearchResult:
    """`best` is None if no deployment meets the targets. `evaluated` is in the order of evaluation."""

    best: EvaluatedDeployment | None
    evaluated: tuple[EvaluatedDeployment, ...]
    num_simulations: int


@dataclass(order=True, slots=True)
class _ByBound:
    """The highest bound first; then the highest prediction, the fewest devices, the earliest item."""

    negative_bound: float
    negative_prediction: float
    num_devices: int
    order: int
    item: Nodes | CandidateDeployment | EvaluatedDeployment = field(compare=False)


def find_best(space: SearchSpace, mapper: Mapper, report: ReportProgress) -> SearchResult:
    return _BestFirst(space, mapper, report).find()


class _BestFirst:
    def __init__(self, space: SearchSpace, mapper: Mapper, report: ReportProgress) -> None:
        self._space = space
        self._mapper = mapper
        self._report = report
        self._heap: list[_ByBound] = []
        self._best: EvaluatedDeployment | None = None
        self._evaluated: list[EvaluatedDeployment] = []
        self._parts: set[Nodes] = set()
        self._num_enumerated = 0
        self._num_simulations = 0
        self._failures = 0
        self._share = 0.0

    def find(self) -> SearchResult:
        self._add_part(self._space.problem.node_types)
        while self._heap and self._bound() > self._required_bound() and self._failures < _MAX_FAILURES:
            item = self._heap[0].item
            if isinstance(item, CandidateDeployment):
                self._predict(self._pop(CandidateDeployment, _BATCH))
            elif isinstance(item, EvaluatedDeployment):
                self._simulate(self._pop(EvaluatedDeployment, 1 if self._best is None else self._mapper.workers))
            else:
                self._enumerate(self._pop(tuple, 1)[0])
        self._evaluated += [entry.item for entry in self._heap if isinstance(entry.item, EvaluatedDeployment)]
        self._evaluated += self._best_of_other_layouts()
        return SearchResult(self._best, tuple(self._evaluated), self._num_simulations)

    def _best_of_other_layouts(self) -> list[EvaluatedDeployment]:
        """For the report: predictions for layouts whose bounds were too low for a prediction in the search."""
        first_of_layout: dict[str, CandidateDeployment] = {}
        for entry in sorted(self._heap):
            if isinstance(entry.item, CandidateDeployment):
                first_of_layout.setdefault(entry.item.layout, entry.item)
        known = {evaluated.deployment.layout for evaluated in self._evaluated}
        deployments = [deployment for layout, deployment in first_of_layout.items() if layout not in known]
        predictor = self._space.predictor
        predictor.prepare(deployments)
        return [
            EvaluatedDeployment(deployment, predictor.goodput(deployment), predictor.limit(deployment))
            for deployment in deployments
        ]

    def _bound(self) -> float:
        return -self._heap[0].negative_bound

    def _best_goodput(self) -> float:
        return 0.0 if self._best is None else self._best.goodput or 0.0

    def _required_bound(self) -> float:
        """An improvement is at least one step of the series of rates."""
        return self._best_goodput() * RATE_RATIO

    def _push(self, bound: float, num_devices: int, item: Nodes | CandidateDeployment | EvaluatedDeployment) -> None:
        if bound > self._required_bound():
            prediction = item.predicted if isinstance(item, EvaluatedDeployment) else bound
            heapq.heappush(self._heap, _ByBound(-bound, -prediction, num_devices, self._num_enumerated, item))

    def _pop(self, item_type: type, maximum: int) -> list[_ByBound]:
        """Leading entries of one type whose bounds are high enough."""
        taken: list[_ByBound] = []
        while self._heap and len(taken) < maximum and isinstance(self._heap[0].item, item_type):
            if self._bound() <= self._required_bound():
                break
            taken.append(heapq.heappop(self._heap))
        return taken

    def _add_part(self, nodes: Nodes) -> None:
        if nodes and nodes not in self._parts:
            self._parts.add(nodes)
            self._push(limit_of_nodes(nodes, self._space.limits), sum(node.num_devices for node in nodes), nodes)

    def _enumerate(self, entry: _ByBound) -> None:
        """Add the deployments of a part of the cluster, and its own parts."""
        nodes = entry.item
        assert isinstance(nodes, tuple)
        self._begin(f"enumerating deployments on {entry.num_devices} devices")
        for deployment in self._space.deployments(nodes):
            self._num_enumerated += 1
            self._push(self._space.predictor.limit(deployment), deployment.num_devices, deployment)
        for index, node in enumerate(nodes):
            for smaller in (replace(node, count=node.count - 1), replace(node, devices=node.devices - 1)):
                kept = (smaller,) if smaller.num_devices else ()
                self._add_part((*nodes[:index], *kept, *nodes[index + 1 :]))

    def _predict(self, entries: list[_ByBound]) -> None:
        predictor = self._space.predictor
        deployments = [entry.item for entry in entries if isinstance(entry.item, CandidateDeployment)]
        self._begin(f"predicting goodput, {predictor.num_evaluated_groups} groups evaluated")
        predictor.prepare(deployments)
        for entry, deployment in zip(entries, deployments, strict=True):
            predicted = predictor.goodput(deployment)
            bound = min(-entry.negative_bound, max_goodput(deployment, predicted))
            self._push(bound, deployment.num_devices, EvaluatedDeployment(deployment, predicted, bound))

    def _simulate(self, entries: list[_ByBound]) -> None:
        candidates = [entry.item for entry in entries if isinstance(entry.item, EvaluatedDeployment)]
        self._begin(f"simulating {candidates[0].deployment}")
        best = self._best_goodput()
        trials = [trial_for(self._space, candidate, best) for candidate in candidates]
        if len(trials) == 1:
            max_rates = [run_trial(self._space.problem, trials[0], self._mapper)]
        else:
            max_rates = self._mapper(partial(run_trial, self._space.problem), trials)
        for candidate, trial, max_rate in zip(candidates, trials, max_rates, strict=True):
            self._num_simulations += max_rate.num_simulations
            goodput = min(max_rate.rate * trial.scale, candidate.bound)
            evaluated = replace(candidate, goodput=goodput)
            self._evaluated.append(evaluated)
            self._failures += 1
            if goodput > best:
                self._best, self._failures, best = evaluated, 0, goodput

    def _begin(self, text: str) -> None:
        """Of a next part. The best goodput divided by the highest bound says what is done; before there is a goodput,
        the bar goes on by a part of the rest."""
        done = min(1.0, self._best_goodput() / self._bound()) if self._heap else 0.0
        self._report(self._share, text)
        self._share = max(self._share + (1 - self._share) * _PART, _MAX_DONE * done)


def max_goodput(deployment: CandidateDeployment, predicted: float) -> float:
    """Upper bound of the simulated goodput, given the prediction and its error."""
    return predicted * (_MARGIN if deployment.layout == "disaggregated" else _COLOCATED_MARGIN)


@dataclass(frozen=True, slots=True)
class Trial:
    """The arguments of `find_max_rate` for the (scaled-down) deployment. `scale`: goodput of the original deployment
    divided by the goodput of this one."""

    deployment: CandidateDeployment
    guess: float
    at_least: float
    at_most: float
    scale: float
    separate_nodes: bool


def trial_for(space: SearchSpace, candidate: EvaluatedDeployment, best: float = 0.0) -> Trial:
    """A trial that ends when the candidate cannot exceed the goodput `best`."""
    deployment = scaled_down(candidate.deployment)
    predicted = space.predictor.goodput(deployment)
    scale = candidate.predicted / predicted if predicted > 0 else 1.0
    is_scaled = deployment != candidate.deployment
    return Trial(
        deployment,
        guess=candidate.predicted / scale,
        at_least=best / scale,
        at_most=candidate.bound / scale,  # a higher goodput counts as that
        scale=scale,
        separate_nodes=is_scaled,
    )


def run_trial(problem: Problem, trial: Trial, mapper: Mapper | None = None) -> MaxRate:
    return find_max_rate(
        problem,
        trial.deployment,
        trial.guess,
        trial.at_least,
        mapper,
        at_most=trial.at_most,
        separate_nodes=trial.separate_nodes,
    )
