"""The chart's values for a plan: the same plan that `tandem serve` runs on one machine."""

import math
from collections import Counter
from pathlib import Path

from tandem.core.errors import ConfigError
from tandem.core.instance_section import InstanceSection
from tandem.core.plan import Plan, PlanGroup
from tandem.deploy.kubernetes.values import ChartValues, ModelValues, Resources, RouterValues, WorkerGroup, Workers
from tandem.deploy.plan_serving import is_on_cpu, planned_sections
from tandem.placement.costs.models import model_shape
from tandem.placement.planned_router import planned_router

CHART = Path(__file__).parent / "chart"
_OVERHEAD_BYTES = 2 << 30  # Python, torch, activations


def values_of(plan: Plan, built_in_model: Path) -> ChartValues:
    """One group of workers for each kind of instances of the plan. Of a model that is not `built_in_model` the source
    is left open: pods do not see the planner's folders.

    Raises ConfigError for a plan that cannot be served.
    """
    kinds = planned_sections(plan)
    num_kinds = Counter(group.role for group, _ in kinds)
    numbers: Counter[str] = Counter()
    groups = []
    for group, section in kinds:
        name = group.role if num_kinds[group.role] == 1 else f"{group.role}-{numbers[group.role]}"
        numbers[group.role] += 1
        groups.append(_worker_group(plan, name, group, section))
    values: dict[str, object] = {"workers": Workers(groups=groups)}
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


def _worker_group(plan: Plan, name: str, group: PlanGroup, section: InstanceSection) -> WorkerGroup:
    fields: dict[str, object] = {"name": name, "role": group.role, "replicas": group.instances}
    instance = section.model_dump(exclude_unset=True, exclude_none=True, exclude={"instances"})
    weights_bytes = model_shape(plan.model).weight_bytes_per_rank(group.shape) * group.shape.num_ranks
    if is_on_cpu(group):
        cores = max(section.engine.threads, group.shape.num_ranks)
        memory = _mebibytes(weights_bytes + section.engine.kv_memory + _OVERHEAD_BYTES)
    else:
        fields["gpus"] = cores = group.shape.num_ranks
        memory = _mebibytes(weights_bytes + _OVERHEAD_BYTES * group.shape.num_ranks)
    fields["resources"] = Resources(requests={"cpu": str(cores), "memory": memory}, limits={"memory": memory})
    return WorkerGroup.model_validate(fields | {"instance": instance})


def _mebibytes(num_bytes: float) -> str:
    return f"{math.ceil(num_bytes / (1 << 20))}Mi"
