"""Single changes of a deployment or of its SLO file: looser targets, one more instance, longer steps, coded KV, other
devices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tandem.core.errors import ConfigError
from tandem.core.kv_codec import KvCodecName
from tandem.core.slo_file import SloFile
from tandem.placement.cluster import Cluster
from tandem.placement.costs.hardware import devices
from tandem.placement.costs.roofline import RooflineSource
from tandem.placement.costs.sources import cost_source_of
from tandem.placement.report.formatting import plural, seconds
from tandem.placement.search.candidate import CandidateDeployment, InstanceGroup
from tandem.placement.search.kinds import phase_kind
from tandem.placement.search.limits import limit_of
from tandem.placement.search.problem import Problem

_LOOSER = 1.2  # a target, times this
_LONGER = 2  # the prompt tokens of a step, times this
_CODEC: KvCodecName = "int8"
_MAX_DEVICE_TYPES = 2  # other ones that are tried: those with the highest limit per USD


@dataclass(frozen=True, slots=True)
class ChangedPlan:
    """`deployment` for `problem`, of which one thing differs from the chosen deployment for its problem."""

    problem: Problem
    deployment: CandidateDeployment
    description: str = ""


def changes_of(slo_file: SloFile, problem: Problem, deployment: CandidateDeployment) -> list[ChangedPlan]:
    """All of them; a new search could find a better plan for the changed problem than the same deployment."""
    return [
        *_looser_targets(problem, deployment),
        *_more_instances(problem, deployment),
        *_longer_steps(problem, deployment),
        *_coded_kv(problem, deployment),
        *_other_devices(slo_file, problem, deployment),
    ]


def _looser_targets(problem: Problem, deployment: CandidateDeployment) -> Iterator[ChangedPlan]:
    for name, target in (("TTFT", "ttft_s"), ("TPOT", "tpot_s")):
        classes = tuple(slo.model_copy(update={target: getattr(slo, target) * _LOOSER}) for slo in problem.classes)
        targets = ", ".join(seconds(getattr(slo, target)) for slo in classes)
        description = f"{name} targets {100 * (_LOOSER - 1):.0f} % looser ({targets})"
        yield ChangedPlan(replace(problem, classes=classes), deployment, description)


def _more_instances(problem: Problem, deployment: CandidateDeployment) -> Iterator[ChangedPlan]:
    """One instance more in a group, or one unit more, on devices that the cluster gets for it."""
    if deployment.same_node:
        more = deployment.with_units(deployment.units + 1)
        count = more.num_devices - deployment.num_devices
        larger = replace(problem, cluster=_larger(problem.cluster, deployment.groups[0].kind.device, count))
        yield ChangedPlan(larger, more, f"one more unit of prefill and decode instances ({plural(count, 'device')})")
        return
    for index, group in enumerate(deployment.groups):
        kind = group.kind
        more = replace(deployment, groups=_with(deployment.groups, index, InstanceGroup(kind, group.instances + 1)))
        larger = replace(problem, cluster=_larger(problem.cluster, kind.device, kind.num_devices))
        added = plural(kind.num_devices, f"{kind.device} device")
        yield ChangedPlan(larger, more, f"one more {kind.role} instance ({added})")


def _larger(cluster: Cluster, device: str, count: int) -> Cluster:
    """With `count` devices more: in its only node, or in nodes like the largest of that type."""
    like = max((node for node in cluster.nodes if node.device.name == device), key=lambda node: node.num_devices)
    if len(cluster.nodes) == 1:
        return replace(cluster, nodes=(replace(like, num_devices=like.num_devices + count),))
    num_nodes = -(-count // like.num_devices)
    added = (replace(like, name=str(len(cluster.nodes) + index)) for index in range(num_nodes))
    return replace(cluster, nodes=(*cluster.nodes, *added))


def _longer_steps(problem: Problem, deployment: CandidateDeployment) -> Iterator[ChangedPlan]:
    for index, group in enumerate(deployment.groups):
        if group.kind.role != "decode":
            tokens = _LONGER * group.kind.max_batch_tokens
            longer = InstanceGroup(replace(group.kind, max_batch_tokens=tokens), group.instances)
            description = f"steps of up to {tokens:,} prompt tokens in {group.kind.role} instances"
            yield ChangedPlan(problem, replace(deployment, groups=_with(deployment.groups, index, longer)), description)


def _coded_kv(problem: Problem, deployment: CandidateDeployment) -> Iterator[ChangedPlan]:
    """The codec that changes answers least, where links between nodes are slow and KV crosses them as it is."""
    is_sent = deployment.sends_kv and not deployment.same_node and problem.cluster.has_slow_links
    if is_sent and problem.kv_codec == "none":
        yield ChangedPlan(replace(problem, kv_codec=_CODEC), deployment, f"KV between nodes in {_CODEC} (kv_codec)")


def _other_devices(slo_file: SloFile, problem: Problem, deployment: CandidateDeployment) -> Iterator[ChangedPlan]:
    """The same instances on other devices of the catalogue, if the deployment uses one type: those that serve most per
    USD by their limits. Only where the roofline has the costs: measured ones of other devices are not known."""
    if len(deployment.devices) != 1 or not isinstance(problem.source, RooflineSource):
        return
    promising: list[tuple[float, str, ChangedPlan]] = []
    for name, device in devices().items():
        if name in problem.cluster.devices or device.price_per_hour is None:
            continue
        variant = _on_device(slo_file, problem, deployment, name)
        price = None if variant is None else variant.problem.cluster.price_per_hour(variant.deployment.devices)
        if variant is not None and price:
            promising.append((_limit(variant) / price, name, variant))
    for limit, _, variant in sorted(promising, key=lambda each: each[:2], reverse=True)[:_MAX_DEVICE_TYPES]:
        if limit > 0:
            yield variant


def _on_device(slo_file: SloFile, problem: Problem, deployment: CandidateDeployment, name: str) -> ChangedPlan | None:
    """None if the model does not fit, or the links between such nodes are unknown."""
    section = slo_file.cluster
    nodes = tuple(
        node.model_copy(
            update={
                "device": name,
                "price_per_device_hour": None,
                "nvlink_gbytes_per_s": None,
                "nic_gbits_per_s": node.nic_gbits_per_s,
            }
        )
        for node in section.nodes
    )
    changed = slo_file.model_copy(update={"cluster": section.model_copy(update={"nodes": nodes})})
    try:
        cluster, source = Cluster.of(changed.cluster), cost_source_of(changed, problem.model)
    except ConfigError:
        return None
    groups = []
    for group in deployment.groups:
        kind, shape = group.kind, group.kind.shape
        cost, kv_tokens = source.cost_model(name, shape), source.kv_tokens(name, shape)
        if cost is None or kv_tokens < int((problem.requests.prompt_tokens + problem.requests.output_tokens).max()):
            return None
        of_phase = phase_kind(kind.role, name, shape, cost, kv_tokens, problem.requests)
        if kind.role == "colocated":
            batch = min(of_phase.max_batch, kind.max_batch_tokens)
            of_phase = replace(of_phase, max_batch_tokens=kind.max_batch_tokens, max_batch=batch, policy=kind.policy)
        groups.append(InstanceGroup(of_phase, group.instances))
    variant = replace(deployment, groups=tuple(groups))
    return ChangedPlan(replace(problem, cluster=cluster, source=source), variant, f"{name} instead")


def _limit(variant: ChangedPlan) -> float:
    """Requests per second that no schedule exceeds."""
    problem, totals = variant.problem, dict[str, float]()
    for group in variant.deployment.groups:
        limit = limit_of(group.kind, problem.classes, problem.computed).rate
        totals[group.kind.role] = totals.get(group.kind.role, 0.0) + group.instances * limit
    phases = [totals[role] for role in ("prefill", "decode") if role in totals]
    return min(phases, default=0.0) + totals.get("colocated", 0.0)


def _with(groups: Sequence[InstanceGroup], index: int, group: InstanceGroup) -> tuple[InstanceGroup, ...]:
    return (*groups[:index], group, *groups[index + 1 :])
