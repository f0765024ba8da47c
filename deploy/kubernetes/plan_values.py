"""The chart's values for a plan: the same plan that `tandem serve` runs on one machine or on Ray."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tandem.core.errors import ConfigError
from tandem.core.instance_section import InstanceSection
from tandem.core.plan import Plan, PlanGroup
from tandem.deploy.kubernetes.values import ChartValues, ModelValues, Resources, RouterValues, WorkerGroup
from tandem.deploy.plan_serving import is_on_cpu, planned_nodes, planned_sections
from tandem.placement.costs.models import model_shape
from tandem.placement.planned_router import planned_router

CHART = Path(__file__).parent / "chart"
_OVERHEAD_BYTES = 2 << 30  # Python, torch, activations


def values_of(plan: Plan, built_in_model: Path) -> ChartValues:
    """One group of workers for each kind of instances of the plan; instances of one kind that the plan divides over
    nodes in different ways are in different groups. Of a model that is not `built_in_model` the source is left open:
    pods do not see the planner's folders.

    Raises ConfigError for a plan that cannot be served.
    """
    kinds = _kinds(plan)
    num_kinds = Counter(group.role for group, _, _ in kinds)
    numbers: Counter[str] = Counter()
    groups = []
    for group, section, ranks_per_pod in kinds:
        name = group.role if num_kinds[group.role] == 1 else f"{group.role}-{numbers[group.role]}"
        numbers[group.role] += 1
        groups.append(_worker_group(plan, name, group, section, ranks_per_pod))
    workers: dict[str, object] = {"groups": groups}
    if any(group.ranksPerPod for group in groups):
        workers["kind"] = "LeaderWorkerSet"
    values: dict[str, object] = {"workers": workers}
    router = planned_router(plan)
    if router.model_fields_set:
        values["router"] = RouterValues.model_validate({"settings": router})
    if Path(plan.model) == built_in_model:
        values["model"] = ModelValues(source="builtIn")
    return ChartValues.model_validate(values)


def check_model(plan: Plan, values: ChartValues) -> None:
    """Raises ConfigError if pods would serve another model than the plan's."""
    if "source" not in values.model.model_fields_set:
        raise ConfigError(
            f"the plan is for {plan.model}, which pods do not see; say where they find it: --set "
            "model.source=persistentVolumeClaim --set model.persistentVolumeClaim=NAME --set model.path=FOLDER, or "
            "--set model.source=download --set model.download.repository=NAME, or --set model.source=hostPath --set "
            "model.hostPath=FOLDER"
        )


def _kinds(plan: Plan) -> list[tuple[PlanGroup, InstanceSection, tuple[int, ...]]]:
    """Each kind of instances as planned, as settings, and its ranks in each pod, none if one pod has all."""
    of_process = planned_nodes(plan).of_process
    numbers: Counter[str] = Counter()
    kinds = []
    for group, section in planned_sections(plan):
        num_instances: Counter[tuple[int, ...]] = Counter()
        for _ in range(group.instances):
            nodes = of_process.get(f"{group.role}-{numbers[group.role]}", ())
            numbers[group.role] += 1
            num_instances[_ranks_per_pod([ranks for _, ranks in nodes])] += 1
        for ranks_per_pod, number in num_instances.items():
            kinds.append((group.model_copy(update={"instances": number}), section, ranks_per_pod))
    return kinds


def _ranks_per_pod(per_node: Sequence[int]) -> tuple[int, ...]:
    """A pod for each node, in any order: all pods of an instance but the first are alike. Raises ConfigError where they
    cannot be."""
    if len(per_node) <= 1:
        return ()
    ((usual, _),) = Counter(sorted(per_node)).most_common(1)
    first = next((ranks for ranks in per_node if ranks != usual), usual)
    per_pod = tuple(sorted(per_node, key=lambda ranks: ranks != first))
    if len(set(per_pod[1:])) > 1:
        raise ConfigError(
            f"the plan has an instance with {', '.join(map(str, per_node))} ranks on its nodes; all pods of an "
            "instance but the first are alike, so all nodes but one need the same number of ranks"
        )
    return per_pod


def _worker_group(
    plan: Plan, name: str, group: PlanGroup, section: InstanceSection, ranks_per_pod: tuple[int, ...]
) -> WorkerGroup:
    """Cores and memory are those of its largest pod."""
    fields: dict[str, object] = {"name": name, "role": group.role, "replicas": group.instances}
    instance = section.model_dump(exclude_unset=True, exclude_none=True, exclude={"instances"})
    num_ranks = max(ranks_per_pod, default=group.shape.num_ranks)
    share = num_ranks / group.shape.num_ranks
    weights_bytes = model_shape(plan.model).weight_bytes_per_rank(group.shape) * num_ranks
    if is_on_cpu(group):
        cores = max(math.ceil(section.engine.threads * share), num_ranks)
        memory = _mebibytes(weights_bytes + section.engine.kv_memory * share + _OVERHEAD_BYTES)
    else:
        fields["gpus"], cores = group.shape.num_ranks, num_ranks
        memory = _mebibytes(weights_bytes + _OVERHEAD_BYTES * num_ranks)
    if ranks_per_pod:
        fields["ranksPerPod"] = list(ranks_per_pod)
    fields["resources"] = Resources(requests={"cpu": str(cores), "memory": memory}, limits={"memory": memory})
    return WorkerGroup.model_validate(fields | {"instance": instance})


def _mebibytes(num_bytes: float) -> str:
    return f"{math.ceil(num_bytes / (1 << 20))}Mi"
