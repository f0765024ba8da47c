"""What a user may change: single changes of the chosen deployment or of its SLO file, with their predicted effect.

All figures are simulated goodputs times ratios of predictions (`sensitivity.predicted_goodput`): the advice costs a few
predictions and no simulation. A changed plan is the same deployment with one thing changed; a new search could find a
better one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tandem.core.errors import ConfigError
from tandem.core.slo_file import SloFile
from tandem.placement.cluster import Cluster
from tandem.placement.costs.hardware import devices
from tandem.placement.costs.roofline import RooflineSource
from tandem.placement.costs.sources import cost_source_of
from tandem.placement.evidence import Advice, Change, LayoutComparison, SensitivityPoint
from tandem.placement.report.formatting import plural, seconds
from tandem.placement.search.best_first import EvaluatedDeployment
from tandem.placement.search.candidate import CandidateDeployment, InstanceGroup
from tandem.placement.search.final_comparison import FinalComparison
from tandem.placement.search.kinds import phase_kind
from tandem.placement.search.limits import limit_of
from tandem.placement.search.mapper import Mapper
from tandem.placement.search.problem import Problem
from tandem.placement.search.sensitivity import Variation, predicted_goodput, variations

_LOOSER = 1.2  # a target, times this
_LONGER = 2  # the prompt tokens of a step, times this
_MAX_DEVICE_TYPES = 2  # other ones that are predicted: those with the highest limit per USD


@dataclass(frozen=True, slots=True)
class _Variant:
    problem: Problem
    deployment: CandidateDeployment
    description: str = ""


def advise(
    slo_file: SloFile,
    problem: Problem,
    comparison: FinalComparison,
    sensitivity: Sequence[SensitivityPoint],
    goodput: float,
    mapper: Mapper,
) -> Advice:
    """For the chosen deployment of `comparison`. `problem`: for a trace that of the window that decides. `sensitivity`
    of the chosen deployment has goodputs that are relative to `goodput`."""
    chosen = comparison.chosen.deployment
    changed = [
        *_looser_targets(problem, chosen),
        *_more_instances(problem, chosen),
        *_longer_steps(problem, chosen),
        *_other_devices(slo_file, problem, chosen),
    ]
    rivals, varied = _best_of_layouts(comparison), list(variations(problem))
    others = [rival.deployment for rival in rivals if rival.deployment != chosen]
    problems = [problem, *(variation.problem for variation in varied)]
    of_rivals = [_Variant(each, deployment) for deployment in others for each in problems]
    before, *predicted = mapper(_predicted, [_Variant(problem, chosen), *changed, *of_rivals])
    changes = [
        Change(
            variant.description,
            comparison.goodput * after / before if before > 0 else 0.0,
            variant.deployment.num_devices,
            variant.problem.cluster.price_per_hour(variant.deployment.devices),
        )
        for variant, after in zip(changed, predicted[: len(changed)], strict=True)
    ]
    ratios = {chosen: _ratios_of(sensitivity, varied, goodput)}  # to the goodput of the unchanged problem
    for index, deployment in enumerate(others):
        unchanged, *after = predicted[len(changed) + index * len(problems) :][: len(problems)]
        ratios[deployment] = [each / unchanged if unchanged > 0 else 0.0 for each in after]
    layouts = _layouts(rivals, ratios, varied) if rivals else None
    return Advice(tuple(sorted(changes, key=_usefulness, reverse=True)), layouts)


def _ratios_of(sensitivity: Sequence[SensitivityPoint], varied: Sequence[Variation], goodput: float) -> list[float]:
    known: dict[tuple[str, float], float] = {(each.axis, each.factor): each.goodput or 0.0 for each in sensitivity}
    return [known[each.axis, each.factor] / goodput for each in varied]


def _layouts(
    rivals: Sequence[EvaluatedDeployment],
    ratios: Mapping[CandidateDeployment, Sequence[float]],
    varied: Sequence[Variation],
) -> LayoutComparison:
    disaggregated, colocated = rivals
    found = _ratio(disaggregated, colocated)
    pairs = zip(varied, ratios[disaggregated.deployment], ratios[colocated.deployment], strict=True)
    return LayoutComparison(
        disaggregated=str(disaggregated.deployment),
        colocated=str(colocated.deployment),
        ratio=found,
        changed=tuple(
            (each.axis, each.factor, found * one / other if other > 0 else math.inf)
            for each, one, other in pairs
            if one > 0 or other > 0
        ),
    )


def _predicted(variant: _Variant) -> float:
    return predicted_goodput(variant.problem, variant.deployment)


def _usefulness(change: Change) -> float:
    return change.goodput / (change.cost_per_hour or change.num_devices)


def _best_of_layouts(comparison: FinalComparison) -> list[EvaluatedDeployment]:
    """The best disaggregated deployment and the best colocated one; none if one of them was not compared."""
    candidates = [comparison.chosen.candidate, *(alternative.candidate for alternative in comparison.alternatives)]
    best = []
    for layout in ("disaggregated", "colocated"):
        of_layout = [candidate for candidate in candidates if candidate.deployment.layout == layout]
        if not of_layout:
            return []
        best.append(max(of_layout, key=_per_device))
    return best


def _ratio(disaggregated: EvaluatedDeployment, colocated: EvaluatedDeployment) -> float:
    """Of the goodputs per device: as simulated, or as predicted where one was not simulated."""
    if disaggregated.goodput and colocated.goodput:
        return _per_device(disaggregated) / _per_device(colocated)
    one, other = (each.predicted / each.deployment.num_devices for each in (disaggregated, colocated))
    return one / other if other > 0 else 0.0


def _per_device(candidate: EvaluatedDeployment) -> float:
    return (candidate.goodput or 0.0) / candidate.deployment.num_devices


# --- changes ---------------------------------------------------------------------------------------------------------


def _looser_targets(problem: Problem, deployment: CandidateDeployment) -> Iterator[_Variant]:
    for name, target in (("TTFT", "ttft_s"), ("TPOT", "tpot_s")):
        classes = tuple(slo.model_copy(update={target: getattr(slo, target) * _LOOSER}) for slo in problem.classes)
        targets = ", ".join(seconds(getattr(slo, target)) for slo in classes)
        description = f"{name} targets {100 * (_LOOSER - 1):.0f} % looser ({targets})"
        yield _Variant(replace(problem, classes=classes), deployment, description)


def _more_instances(problem: Problem, deployment: CandidateDeployment) -> Iterator[_Variant]:
    """One instance more in a group, or one unit more. The cluster need not have the devices."""
    if deployment.same_node:
        more = deployment.with_units(deployment.units + 1)
        added = plural(more.num_devices - deployment.num_devices, "device")
        yield _Variant(problem, more, f"one more unit of prefill and decode instances ({added})")
        return
    for index, group in enumerate(deployment.groups):
        larger = InstanceGroup(group.kind, group.instances + 1)
        more = replace(deployment, groups=_with(deployment.groups, index, larger))
        added = plural(group.kind.num_devices, f"{group.kind.device} device")
        yield _Variant(problem, more, f"one more {group.kind.role} instance ({added})")


def _longer_steps(problem: Problem, deployment: CandidateDeployment) -> Iterator[_Variant]:
    for index, group in enumerate(deployment.groups):
        if group.kind.role != "decode":
            tokens = _LONGER * group.kind.max_batch_tokens
            longer = InstanceGroup(replace(group.kind, max_batch_tokens=tokens), group.instances)
            description = f"steps of up to {tokens:,} prompt tokens in {group.kind.role} instances"
            yield _Variant(problem, replace(deployment, groups=_with(deployment.groups, index, longer)), description)


def _other_devices(slo_file: SloFile, problem: Problem, deployment: CandidateDeployment) -> Iterator[_Variant]:
    """The same instances on other devices of the catalogue, if the deployment uses one type: those that serve most per
    USD by their limits. Only where the roofline has the costs: measured ones of other devices are not known."""
    if len(deployment.devices) != 1 or not isinstance(problem.source, RooflineSource):
        return
    promising: list[tuple[float, str, _Variant]] = []
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


def _on_device(slo_file: SloFile, problem: Problem, deployment: CandidateDeployment, name: str) -> _Variant | None:
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
    return _Variant(replace(problem, cluster=cluster, source=source), variant, f"{name} instead")


def _limit(variant: _Variant) -> float:
    """Requests per second that no schedule exceeds."""
    problem, totals = variant.problem, dict[str, float]()
    for group in variant.deployment.groups:
        limit = limit_of(group.kind, problem.classes, problem.computed).rate
        totals[group.kind.role] = totals.get(group.kind.role, 0.0) + group.instances * limit
    phases = [totals[role] for role in ("prefill", "decode") if role in totals]
    return min(phases, default=0.0) + totals.get("colocated", 0.0)


def _with(groups: Sequence[InstanceGroup], index: int, group: InstanceGroup) -> tuple[InstanceGroup, ...]:
    return (*groups[:index], group, *groups[index + 1 :])
