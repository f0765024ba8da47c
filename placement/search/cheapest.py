"""The cheapest deployment that serves a rate: DistServe's n = ceil(R / goodput) with prices, checked by simulation.

Deployments start with the number of instances that their limits require. The cheapest deployment is evaluated first:
predicted, then simulated at the rate. If it misses the targets, deployments with one instance more in one of its groups
follow. The first deployment that meets the targets is the result: all cheaper ones missed them.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from tandem.placement.search.best_first import EvaluatedDeployment, ReportProgress, SearchResult, max_goodput
from tandem.placement.search.candidate import CandidateDeployment, InstanceGroup
from tandem.placement.search.enumeration import low_affinity
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.search.mapper import Mapper
from tandem.placement.search.packing import count_fitting
from tandem.placement.search.space import SearchSpace
from tandem.placement.search.trial import scaled_down, simulate_at

_GROWTH = 0.03  # share of a group's instances to add, at least one
_BATCH = 16
_MAX_EVALUATIONS = 4000
_MAX_REPLACED = 2  # instances of a group that colocated instances may replace
_MAX_MIXTURES = 128


@dataclass(order=True, slots=True)
class _ByPrice:
    """The lowest price first; of equal prices the earliest deployment."""

    price: float
    order: int
    deployment: CandidateDeployment = field(compare=False)


def find_cheapest(space: SearchSpace, mapper: Mapper, report: ReportProgress) -> SearchResult:
    """For `space.problem.rate`. `best` is None if the cluster cannot serve the rate."""
    return _CheapestFirst(space, mapper, report).find()


class _CheapestFirst:
    def __init__(self, space: SearchSpace, mapper: Mapper, report: ReportProgress) -> None:
        assert space.problem.rate is not None
        self._space = space
        self._rate = space.problem.rate
        self._mapper = mapper
        self._report = report
        self._heap: list[_ByPrice] = []
        self._known: set[CandidateDeployment] = set()
        self._evaluated: list[EvaluatedDeployment] = []
        self._num_simulations = 0

    def find(self) -> SearchResult:
        best: EvaluatedDeployment | None = None
        for deployment in self._smallest_deployments():
            self._push(deployment)
        while self._heap and best is None and len(self._evaluated) < _MAX_EVALUATIONS:
            entries = [heapq.heappop(self._heap) for _ in range(min(_BATCH, len(self._heap)))]
            self._space.predictor.prepare(entry.deployment for entry in entries)
            for index, entry in enumerate(entries):
                evaluated = self._evaluate(entry.deployment)
                if evaluated.goodput:
                    best = evaluated
                    break
                for deployment in self._larger(entry.deployment):
                    self._push(deployment)
                # Later entries of the batch wait if a deployment that was just added is cheaper.
                if self._heap and index + 1 < len(entries) and self._heap[0] < entries[index + 1]:
                    for later in entries[index + 1 :]:
                        heapq.heappush(self._heap, later)
                    break
        if best is not None and "mixed" in self._space.problem.section.layouts:
            best = self._find_mixture(best) or best
        return SearchResult(best, tuple(self._evaluated), self._num_simulations)

    def _evaluate(self, deployment: CandidateDeployment) -> EvaluatedDeployment:
        predictor = self._space.predictor
        predicted = predictor.goodput(deployment)
        bound = min(predictor.limit(deployment), max_goodput(deployment, predicted))
        evaluated = EvaluatedDeployment(deployment, predicted, bound)
        if bound >= self._rate:
            self._report(min(0.9, self._num_simulations / 20), f"simulating {deployment}")
            trial = scaled_down(deployment)
            trial_goodput = predictor.goodput(trial)
            rate = self._rate * (trial_goodput / predicted if trial_goodput > 0 else 1.0)
            # As served: the first that meets the targets is the result, which nothing is compared with.
            _, evaluation = simulate_at(self._space.problem.served(), trial, rate, separate_nodes=trial != deployment)
            self._num_simulations += 1
            evaluated = replace(evaluated, goodput=self._rate if evaluation.meets else 0.0)
        self._evaluated.append(evaluated)
        return evaluated

    def _find_mixture(self, best: EvaluatedDeployment) -> EvaluatedDeployment | None:
        """A mixed deployment that is cheaper than `best` and meets the targets; None if there is none."""
        deployments = sorted(self._mixtures(best.deployment), key=self._price)[:_MAX_MIXTURES]
        for begin in range(0, len(deployments), _BATCH):
            batch = deployments[begin : begin + _BATCH]
            self._space.predictor.prepare(batch)
            for deployment in batch:
                evaluated = self._evaluate(deployment)
                if evaluated.goodput:
                    return evaluated
        return None

    def _mixtures(self, deployment: CandidateDeployment) -> Iterator[CandidateDeployment]:
        """Mixed deployments cheaper than `deployment`: fewer of its instances, and the number of colocated instances
        that the limits require for the remaining rate."""
        if deployment.layout != "disaggregated" or deployment.same_node:
            return
        price, predictor = self._price(deployment), self._space.predictor
        counts = (range(max(1, group.instances - _MAX_REPLACED), group.instances + 1) for group in deployment.groups)
        for instances in product(*counts):
            groups = tuple(
                InstanceGroup(group.kind, count) for group, count in zip(deployment.groups, instances, strict=True)
            )
            missing = self._rate - predictor.limit(CandidateDeployment(groups))
            if missing <= 0:
                continue
            for kind in self._space.kinds.colocated:
                mixture = CandidateDeployment((*groups, self._smallest_group(kind, missing)))
                if self._price(mixture) < price and self._fits(mixture):
                    yield mixture

    def _price(self, deployment: CandidateDeployment) -> float:
        return self._space.problem.price_per_hour(deployment.devices)

    def _push(self, deployment: CandidateDeployment) -> None:
        if deployment not in self._known and self._fits(deployment):
            self._known.add(deployment)
            heapq.heappush(self._heap, _ByPrice(self._price(deployment), len(self._known), deployment))

    def _fits(self, deployment: CandidateDeployment) -> bool:
        nodes = self._space.problem.node_types
        if deployment.same_node:
            device = deployment.groups[0].kind.device
            per_node = deployment.num_devices // deployment.units // deployment.span
            eligible = sum(node.count for node in nodes if node.device == device and node.devices >= per_node)
            return deployment.units * deployment.span <= eligible
        return all(
            count_fitting(nodes, group.kind, beside=deployment.groups[:index]) >= group.instances
            for index, group in enumerate(deployment.groups)
        )

    def _smallest_deployments(self) -> Iterator[CandidateDeployment]:
        """Every combination of kinds with the fewest instances that the limits allow."""
        kinds, section = self._space.kinds, self._space.problem.section
        if "disaggregated" in section.layouts:
            if self._space.allows_high_affinity:
                for prefill in kinds.prefill:
                    for decode in kinds.decode:
                        groups = self._smallest_group(prefill, self._rate), self._smallest_group(decode, self._rate)
                        yield CandidateDeployment(groups)
            if self._space.allows_low_affinity:
                for node in self._space.problem.node_types:
                    for span in range(1, node.count + 1):
                        for unit in low_affinity(kinds, [replace(node, count=span)]):
                            if unit.span == span:
                                limit = self._space.predictor.limit(unit)
                                yield unit.with_units(max(1, math.ceil(self._rate / limit - 1e-9)))
        if "colocated" in section.layouts:
            yield from (CandidateDeployment((self._smallest_group(kind, self._rate),)) for kind in kinds.colocated)

    def _smallest_group(self, kind: InstanceKind, rate: float) -> InstanceGroup:
        return InstanceGroup(kind, max(1, math.ceil(rate / self._space.limits[kind].rate - 1e-9)))

    def _larger(self, deployment: CandidateDeployment) -> Iterator[CandidateDeployment]:
        if deployment.same_node:
            yield deployment.with_units(deployment.units + _growth(deployment.units))
            return
        for index, group in enumerate(deployment.groups):
            larger = InstanceGroup(group.kind, group.instances + _growth(group.instances))
            yield CandidateDeployment((*deployment.groups[:index], larger, *deployment.groups[index + 1 :]))


def _growth(count: int) -> int:
    return max(1, round(_GROWTH * count))
