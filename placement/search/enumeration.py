"""The candidate deployments of a cluster. Only deployments to which no instance can be added are enumerated: smaller
deployments belong to smaller parts of the cluster.

Disaggregated deployments follow DistServe's two algorithms (OSDI 2024, section 4).

Algorithm 1, high node affinity: KV may move between any two nodes, so each phase is chosen on its own: any prefill kind
with any decode kind, in numbers that match their rates, on devices of different types if necessary.

Algorithm 2, low node affinity: KV stays inside a node. A unit of n prefill and m decode instances shares a node, or
`span` nodes if the stages are divided into `span` segments; a node then holds the same layers of both phases. The
deployment has as many units as fit. DistServe has n = m = 1.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from tandem.placement.search.candidate import CandidateDeployment, InstanceGroup
from tandem.placement.search.kinds import InstanceKind, Kinds
from tandem.placement.search.limits import KindLimits
from tandem.placement.search.packing import count_fitting
from tandem.placement.search.problem import NodeType

_EXACT_COUNT = 12
_COUNT_RATIO = 1.05
_MAX_SPAN = 4


def high_affinity(kinds: Kinds, nodes: Sequence[NodeType]) -> Iterator[CandidateDeployment]:
    """The deployments of Algorithm 1."""
    for prefill in kinds.prefill:
        for count in _counts(count_fitting(nodes, prefill)):
            group = InstanceGroup(prefill, count)
            for decode in kinds.decode:
                if fitting := count_fitting(nodes, decode, beside=[group]):
                    yield CandidateDeployment((group, InstanceGroup(decode, fitting)))


def low_affinity(kinds: Kinds, nodes: Sequence[NodeType]) -> Iterator[CandidateDeployment]:
    """The deployments of Algorithm 2, on nodes of one type at a time."""
    for node in nodes:
        for span in range(1, min(node.count, _MAX_SPAN) + 1):
            units = node.count // span
            for prefill in _segmented(kinds.prefill, node, span):
                for decode in _segmented(kinds.decode, node, span):
                    prefill_devices, decode_devices = prefill.num_devices // span, decode.num_devices // span
                    for count in range(1, node.devices // prefill_devices + 1):
                        if fitting := (node.devices - count * prefill_devices) // decode_devices:
                            groups = InstanceGroup(prefill, units * count), InstanceGroup(decode, units * fitting)
                            yield CandidateDeployment(groups, units=units, span=span)


def colocated(kinds: Kinds, nodes: Sequence[NodeType]) -> Iterator[CandidateDeployment]:
    """As many instances of one kind as fit."""
    for kind in kinds.colocated:
        if fitting := count_fitting(nodes, kind):
            yield CandidateDeployment((InstanceGroup(kind, fitting),))


def heterogeneous(kinds: Kinds, limits: KindLimits, nodes: Sequence[NodeType]) -> Iterator[CandidateDeployment]:
    """Two groups on different types of device in one phase: one type serves both phases, another type adds its best
    kind to one phase. (`high_affinity` has the deployments with one type per phase.)"""
    devices = sorted({node.device for node in nodes})
    for first in devices:
        own = replace(kinds, prefill=_of_device(kinds.prefill, first), decode=_of_device(kinds.decode, first))
        for other in devices:
            helpers = [
                max(groups, key=lambda group: group.instances * limits[group.kind].rate)
                for role in (kinds.prefill, kinds.decode)
                if (
                    groups := [
                        InstanceGroup(kind, count)
                        for kind in _of_device(role, other)
                        if (count := count_fitting(nodes, kind))
                    ]
                )
            ]
            if other != first:
                for deployment in high_affinity(own, [node for node in nodes if node.device == first]):
                    yield from (CandidateDeployment((*deployment.groups, helper)) for helper in helpers)


def mixed(
    deployments: Iterable[CandidateDeployment],
    kinds: Kinds,
    limits: KindLimits,
    nodes: Sequence[NodeType],
) -> Iterator[CandidateDeployment]:
    """Each of `deployments`, and each with one instance less, plus the best group of colocated instances that fits.

    A mixture is better than both layouts only if disaggregation leaves devices unused, or if devices differ.
    """
    for deployment in deployments:
        for groups in (deployment.groups, *_one_instance_less(deployment.groups)):
            best, best_rate = None, 0.0
            for kind in kinds.colocated:
                fitting = count_fitting(nodes, kind, beside=groups)
                if fitting * limits[kind].rate > best_rate:
                    best, best_rate = InstanceGroup(kind, fitting), fitting * limits[kind].rate
            if best is not None:
                yield CandidateDeployment((*groups, best))


def _one_instance_less(groups: tuple[InstanceGroup, ...]) -> Iterator[tuple[InstanceGroup, ...]]:
    for index, group in enumerate(groups):
        if group.instances > 1:
            yield (*groups[:index], InstanceGroup(group.kind, group.instances - 1), *groups[index + 1 :])


def _of_device(kinds: Sequence[InstanceKind], device: str) -> tuple[InstanceKind, ...]:
    return tuple(kind for kind in kinds if kind.device == device)


def _segmented(kinds: Sequence[InstanceKind], node: NodeType, span: int) -> list[InstanceKind]:
    """The kinds whose stages divide over `span` nodes of this type and fit them."""
    return [
        kind
        for kind in _of_device(kinds, node.device)
        if kind.shape.pp % span == 0 and kind.num_devices // span <= node.devices
    ]


def _counts(maximum: int) -> Iterator[int]:
    """1 to `maximum`: all small numbers, then steps of 5 %, a difference below the error of measurements."""
    count = 1
    while count <= maximum:
        yield count
        count = max(count + 1, round(count * _COUNT_RATIO)) if count >= _EXACT_COUNT else count + 1
