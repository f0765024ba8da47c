"""What a fleet is expected to reach, from limits and from curves of its pools: no simulation of the whole.

    limit      no pool can pass more than its instances' limits, nor the links between nodes more than their bytes; a
               plain minimum over the phases
    predicted  a request meets its SLO when both phases keep their target. Queues of the two phases are nearly
               independent, so their attainments multiply; goodput is the highest rate at which the product is what is
               asked for. Colocated instances beside them add theirs (and a little more: see `best_first.most_of`).

DistServe divides a rate by the goodput of each phase at the full attainment, which plans for 81 % where 90 % was asked.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tandem.placement.search.curves import Curve, CurveKey
from tandem.placement.search.fleet import Fleet, Pool
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.search.limits import Limit
from tandem.placement.search.problem import NodeType, Problem

_BISECTIONS = 24
_MULTIPLIERS = 101

Limits = Mapping[InstanceKind, Limit]


def limit_of_nodes(nodes: Sequence[NodeType], limits: Limits) -> float:
    """Requests per second that no fleet on these nodes can exceed, however its instances are chosen and cut.

    The dual of a linear programme: whatever part m of a request's worth one gives to its prefill, and 1 - m to its
    decode, no device can earn more than with the role that pays best.
    """
    best: dict[str, dict[str, float]] = {node.device: {} for node in nodes}
    for kind, its in limits.items():
        of_device = best.get(kind.device)
        if of_device is not None:
            of_device[kind.role] = max(of_device.get(kind.role, 0.0), its.rate / kind.num_devices)
    total: dict[str, int] = {}
    for node in nodes:
        total[node.device] = total.get(node.device, 0) + node.num_devices

    def worth(multiplier: float) -> float:
        return sum(
            count
            * max(
                multiplier * best[device].get("prefill", 0.0),
                (1 - multiplier) * best[device].get("decode", 0.0),
                best[device].get("colocated", 0.0),
            )
            for device, count in total.items()
        )

    return min(worth(multiplier) for multiplier in np.linspace(0, 1, _MULTIPLIERS).tolist())


@dataclass(frozen=True, slots=True)
class _Part:
    """A pool, the curve of its kind, and the share of the phase's rate that one of its instances gets."""

    curve: Curve
    share_of_instance: float
    share_of_pool: float


class Predictor:
    """Predictions of fleets; the curves they need are asked for when they are, and kept."""

    def __init__(
        self, problem: Problem, limits: Limits, compute: Callable[[Sequence[CurveKey]], Sequence[Curve]]
    ) -> None:
        self._problem = problem
        self._limits = limits
        self._compute = compute
        self._curves: dict[CurveKey, Curve] = {}

    @property
    def num_curves(self) -> int:
        return len(self._curves)

    def limit(self, fleet: Fleet) -> float:
        """Requests per second that the fleet cannot exceed."""
        split = min(_pass(fleet.of_role("prefill"), self._limits), _pass(fleet.of_role("decode"), self._limits))
        if split and not (fleet.same_node or self._one_node):
            split = min(split, self._pass_links(fleet))
        return split + _pass(fleet.of_role("colocated"), self._limits)

    def prepare(self, fleets: Iterable[Fleet]) -> None:
        """Have the curves of all of them computed at once."""
        keys = [key for fleet in fleets for pool in fleet.pools for key in [self._key(fleet, pool)]]
        missing = [key for key in dict.fromkeys(keys) if key not in self._curves]
        self._curves.update(zip(missing, self._compute(missing), strict=True))

    def goodput(self, fleet: Fleet) -> float:
        """Requests per second of the whole fleet, never above its limit."""
        self.prepare([fleet])
        split = self._goodput([self._parts(fleet, "prefill"), self._parts(fleet, "decode")])
        return min(self.limit(fleet), split + self._goodput([self._parts(fleet, "colocated")]))

    def curve(self, fleet: Fleet, pool: Pool) -> Curve:
        self.prepare([fleet])
        return self._curves[self._key(fleet, pool)]

    def _goodput(self, phases: Sequence[list[_Part]]) -> float:
        """The highest rate at which the phases' attainments multiply to what every class asks for."""
        if not all(phases):
            return 0.0
        asked = np.array([slo.attainment for slo in self._problem.classes])

        def is_met(rate: float) -> bool:
            met = np.ones(len(asked))
            for parts in phases:
                met *= sum(part.share_of_pool * part.curve.at(rate * part.share_of_instance) for part in parts)
            return bool(np.all(met >= asked - 1e-12))

        low, high = 0.0, min(self._most(parts) for parts in phases)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if is_met(middle) else (low, middle)
        return low

    @staticmethod
    def _most(parts: list[_Part]) -> float:
        """The rate at which one of them is asked for more than its curve knows."""
        return min(
            (float(part.curve.rates[-1]) if len(part.curve.rates) else 0.0) / part.share_of_instance for part in parts
        )

    def _parts(self, fleet: Fleet, role: str) -> list[_Part]:
        """The pools of a role share its rate in proportion to what they can pass."""
        pools = fleet.of_role(role)
        whole = _pass(pools, self._limits)
        if whole == 0:
            return []
        parts = []
        for pool in pools:
            share = self._limits[pool.kind].rate / whole
            curve = self._curves[self._key(fleet, pool)]
            parts.append(_Part(curve, share, share * pool.instances))
        return [part for part in parts if part.share_of_pool > 0]

    def _key(self, fleet: Fleet, pool: Pool) -> CurveKey:
        kind, problem = pool.kind, self._problem
        rate, transfer_s, together = self._limits[kind].rate, 0.0, pool.instances
        if kind.role == "decode":
            sources = fleet.of_role("prefill")
            devices = [kind.device, *(source.kind.device for source in sources)]
            ranks = min(kind.num_devices, *(source.kind.num_devices for source in sources))
            transfer_s = problem.transfer_s_per_token(devices, ranks, same_node=fleet.same_node or self._one_node)
            if fleet.same_node:
                together = max(1, pool.instances // fleet.units)
        return CurveKey.of(kind, together, rate, transfer_s, len(problem.computed))

    def _pass_links(self, fleet: Fleet) -> float:
        """Requests per second whose KV the nodes that the prefill instances fill can send."""
        problem, sent = self._problem, 0.0
        for pool in fleet.of_role("prefill"):
            per_node = problem.cluster.devices_per_node[pool.kind.device]
            nodes = -(-pool.num_devices // per_node)
            sent += nodes / problem.transfer_s_per_token([pool.kind.device], 1, same_node=False)
        return sent / float(problem.requests.prompt_tokens.mean())

    @property
    def _one_node(self) -> bool:
        return len(self._problem.cluster.nodes) == 1


def _pass(pools: Sequence[Pool], limits: Limits) -> float:
    return sum(pool.instances * limits[pool.kind].rate for pool in pools)
