"""The predicted goodput of a deployment, from limits and from the attainment of its groups, without a full simulation.

    limit      the minimum over the phases of the sum of the instances' limits, and the bandwidth of links between nodes
    predicted  a request meets its SLO if both phases meet their target. The queues of the phases are nearly
    independent, so their attainments multiply. Goodput is the highest rate at which the product reaches the required
    attainment. Colocated instances add their own goodput (see also `best_first.max_goodput`).

DistServe divides a rate by the goodput of each phase at the required attainment; with 90 % required, the product is 81
%.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tandem.placement.search.candidate import CandidateDeployment, InstanceGroup
from tandem.placement.search.group_attainment import AttainmentKey, GroupAttainment
from tandem.placement.search.limits import KindLimits
from tandem.placement.search.problem import NodeType, Problem

_BISECTIONS = 24
_MULTIPLIERS = 101


def limit_of_nodes(nodes: Sequence[NodeType], limits: KindLimits) -> float:
    """Requests per second that no deployment on these nodes can exceed.

    The dual of a linear programme: a request has the value 1, m for its prefill and 1 - m for its decode. No device
    earns more than with its most valuable role. The bound is the minimum over m.
    """
    best: dict[str, dict[str, float]] = {node.device: {} for node in nodes}
    for kind, limit in limits.items():
        of_device = best.get(kind.device)
        if of_device is not None:
            of_device[kind.role] = max(of_device.get(kind.role, 0.0), limit.rate / kind.num_devices)
    total: dict[str, int] = {}
    for node in nodes:
        total[node.device] = total.get(node.device, 0) + node.num_devices

    def value(multiplier: float) -> float:
        return sum(
            count
            * max(
                multiplier * best[device].get("prefill", 0.0),
                (1 - multiplier) * best[device].get("decode", 0.0),
                best[device].get("colocated", 0.0),
            )
            for device, count in total.items()
        )

    return min(value(multiplier) for multiplier in np.linspace(0, 1, _MULTIPLIERS).tolist())


@dataclass(frozen=True, slots=True)
class _GroupShare:
    """The attainment of a group, and the shares of the phase's rate for one instance and for the group."""

    attainment: GroupAttainment
    share_of_instance: float
    share_of_group: float


class Predictor:
    """Predictions of deployments. Attainments of groups are computed when first needed, and cached."""

    def __init__(
        self,
        problem: Problem,
        limits: KindLimits,
        compute: Callable[[Sequence[AttainmentKey]], Sequence[GroupAttainment]],
    ) -> None:
        self._problem = problem
        self._limits = limits
        self._compute = compute
        self._attainments: dict[AttainmentKey, GroupAttainment] = {}

    @property
    def num_evaluated_groups(self) -> int:
        return len(self._attainments)

    def limit(self, deployment: CandidateDeployment) -> float:
        """Requests per second that the deployment cannot exceed."""
        prefill, decode = self._limit_of(deployment.of_role("prefill")), self._limit_of(deployment.of_role("decode"))
        disaggregated = min(prefill, decode)
        if disaggregated and not (deployment.same_node or self._one_node):
            disaggregated = min(disaggregated, self._link_limit(deployment))
        return disaggregated + self._limit_of(deployment.of_role("colocated"))

    def prepare(self, deployments: Iterable[CandidateDeployment]) -> None:
        """Compute the missing attainments of all deployments in one call."""
        keys = [self._key(deployment, group) for deployment in deployments for group in deployment.groups]
        missing = [key for key in dict.fromkeys(keys) if key not in self._attainments]
        self._attainments.update(zip(missing, self._compute(missing), strict=True))

    def goodput(self, deployment: CandidateDeployment) -> float:
        """Predicted requests per second of the deployment, never above its limit."""
        self.prepare([deployment])
        disaggregated = self._goodput([self._shares(deployment, "prefill"), self._shares(deployment, "decode")])
        return min(self.limit(deployment), disaggregated + self._goodput([self._shares(deployment, "colocated")]))

    def _goodput(self, phases: Sequence[list[_GroupShare]]) -> float:
        """The highest rate at which the product of the phases' attainments reaches every class's required
        attainment."""
        if not all(phases):
            return 0.0
        required = np.array([slo.attainment for slo in self._problem.classes])

        def is_met(rate: float) -> bool:
            met = np.ones(len(required))
            for shares in phases:
                met *= sum(
                    share.share_of_group * share.attainment.at(rate * share.share_of_instance) for share in shares
                )
            return bool(np.all(met >= required - 1e-12))

        low, high = 0.0, min(self._highest_rate(shares) for shares in phases)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if is_met(middle) else (low, middle)
        return low

    @staticmethod
    def _highest_rate(shares: list[_GroupShare]) -> float:
        """The rate at which the first group reaches the highest rate of its attainment."""
        return min(
            (float(share.attainment.rates[-1]) if len(share.attainment.rates) else 0.0) / share.share_of_instance
            for share in shares
        )

    def _shares(self, deployment: CandidateDeployment, role: str) -> list[_GroupShare]:
        """The groups of a role share its rate in proportion to their limits."""
        groups = deployment.of_role(role)
        total = self._limit_of(groups)
        if total == 0:
            return []
        shares = []
        for group in groups:
            share = self._limits[group.kind].rate / total
            attainment = self._attainments[self._key(deployment, group)]
            shares.append(_GroupShare(attainment, share, share * group.instances))
        return [share for share in shares if share.share_of_group > 0]

    def _key(self, deployment: CandidateDeployment, group: InstanceGroup) -> AttainmentKey:
        kind, problem = group.kind, self._problem
        rate, transfer_s, instances = self._limits[kind].rate, 0.0, group.instances
        if kind.role == "decode":
            sources = deployment.of_role("prefill")
            devices = [kind.device, *(source.kind.device for source in sources)]
            ranks = min(kind.num_devices, *(source.kind.num_devices for source in sources))
            transfer_s = problem.transfer_s_per_token(devices, ranks, same_node=deployment.same_node or self._one_node)
            if deployment.same_node:
                instances = max(1, group.instances // deployment.units)
        return AttainmentKey.of(kind, instances, rate, transfer_s, len(problem.computed))

    def _link_limit(self, deployment: CandidateDeployment) -> float:
        """Requests per second whose KV the nodes of the prefill instances can send."""
        problem, tokens_per_s = self._problem, 0.0
        for group in deployment.of_role("prefill"):
            per_node = problem.cluster.devices_per_node[group.kind.device]
            nodes = -(-group.num_devices // per_node)
            tokens_per_s += nodes / problem.transfer_s_per_token([group.kind.device], 1, same_node=False)
        return tokens_per_s / float(problem.requests.prompt_tokens.mean()) / problem.requests.load

    def _limit_of(self, groups: Sequence[InstanceGroup]) -> float:
        return sum(group.instances * self._limits[group.kind].rate for group in groups)

    @property
    def _one_node(self) -> bool:
        return len(self._problem.cluster.nodes) == 1
