"""Turns a plan into a serve configuration, for this machine or for the nodes of a Ray cluster."""

import math
from collections import Counter

from tandem.core.config import ServeConfig
from tandem.core.config_file import load_config
from tandem.core.errors import ConfigError
from tandem.core.instance_section import ROLES, EngineSection, InstanceSection
from tandem.core.plan import Plan, PlanGroup, node_of, ranks_on_nodes
from tandem.core.precision import AS_STORED
from tandem.core.slo_file import SloFile
from tandem.core.step_coefficients import StepCoefficients
from tandem.deploy.node_placement import PlannedNodes
from tandem.deploy.topology import Machine
from tandem.placement.cluster import Cluster
from tandem.placement.costs.calibration import Calibration
from tandem.placement.costs.models import model_shape
from tandem.placement.planned_router import planned_router

_CPU = "cpu"
_FLOAT32_BYTES = 4.0
_BFLOAT16_BYTES = 2.0


def serve_config_of(plan: Plan, machine: Machine) -> ServeConfig:
    """Instances, step bounds, KV memory and router as planned. `plan.model` must be a checkpoint's folder.

    Raises ConfigError for a plan that cannot run on `machine`.
    """
    sections: dict[str, list[InstanceSection]] = {role: [] for role in ROLES}
    multiplies_bf16 = machine.nodes == 0 and machine.multiplies_bf16
    for group, section in planned_sections(plan, multiplies_bf16=multiplies_bf16):
        sections[group.role].append(section)
    _check_machine(plan, machine)
    return ServeConfig.model_validate({"model": plan.model, "router": planned_router(plan), **sections})


def planned_sections(plan: Plan, *, multiplies_bf16: bool = False) -> list[tuple[PlanGroup, InstanceSection]]:
    """Each kind of instances, as planned and as settings. With a calibration, the settings have the calibration's
    threads and dtype, for which the plan's predictions hold. `multiplies_bf16`: the CPUs that they will run on are
    known to, so the engine picks bf16. Raises ConfigError for a plan that cannot be served."""
    _check_shapes(plan)
    calibrations = _calibrations(plan)
    kinds = []
    for group in _kinds(plan):
        calibration = calibrations.get(group.device.casefold())
        section = InstanceSection(
            instances=group.instances,
            max_batch=group.max_batch,
            max_batch_tokens=None if group.role == "decode" else group.max_batch_tokens,
            max_prefill_tokens=group.max_prefill_tokens,
            policy=group.policy,
            kv_codec=plan.kv_codec,
            step_cost=_step_cost(group, calibration),
            engine=_engine(plan, group, calibration, multiplies_bf16),
        )
        kinds.append((group, section))
    return kinds


def planned_nodes(plan: Plan) -> PlannedNodes:
    """On which of the plan's nodes the ranks of each process are, as `deploy.topology` names the processes. Instances
    without devices in the plan may be anywhere."""
    devices: dict[PlanGroup, list[tuple[str, ...]]] = {}
    for group in plan.groups:
        devices.setdefault(_kind_of(group), []).extend(group.devices or [()] * group.instances)
    numbers: Counter[str] = Counter()
    of_process: dict[str, tuple[tuple[str, int], ...]] = {}
    gpus: Counter[str] = Counter()
    for kind, instances in devices.items():
        for ranks in instances:
            name = f"{kind.role}-{numbers[kind.role]}"
            numbers[kind.role] += 1
            if ranks:
                of_process[name] = ranks_on_nodes(ranks)
            if not is_on_cpu(kind):
                gpus.update(node_of(rank) for rank in ranks)
    return PlannedNodes(of_process, gpus, keeps_kv=plan.same_node)


def is_on_cpu(group: PlanGroup) -> bool:
    return group.device.casefold() == _CPU


def _kinds(plan: Plan) -> list[PlanGroup]:
    """The plan's groups; groups that differ in their devices only are merged."""
    kinds: Counter[PlanGroup] = Counter()
    for group in plan.groups:
        kinds[_kind_of(group)] += group.instances
    return [kind.model_copy(update={"instances": instances}) for kind, instances in kinds.items()]


def _kind_of(group: PlanGroup) -> PlanGroup:
    return group.model_copy(update={"instances": 1, "devices": ()})


def _engine(plan: Plan, group: PlanGroup, calibration: Calibration | None, multiplies_bf16: bool) -> EngineSection:
    """Its KV memory holds the planned tokens."""
    device = _CPU if is_on_cpu(group) else "cuda"
    engine: dict[str, object] = {"device": device, "tp": group.tp, "pp": group.pp}
    if calibration is not None:
        memory = math.ceil(group.kv_tokens * calibration.kv_bytes_per_token)
        threads = calibration.threads * group.shape.num_ranks  # as calibrated, on each rank
        return EngineSection.model_validate(
            engine | {"kv_memory": memory, "dtype": calibration.dtype, "threads": threads}
        )
    shape = model_shape(plan.model)
    per_token = shape.kv_bytes_per_token
    if device == _CPU:  # the engine picks the dtype that is fast there; on unknown CPUs the memory suffices for both
        is_bf16 = multiplies_bf16 and shape.kv_bytes < _FLOAT32_BYTES
        per_token *= (_BFLOAT16_BYTES if is_bf16 else _FLOAT32_BYTES) / shape.kv_bytes
    return EngineSection.model_validate(engine | {"kv_memory": math.ceil(group.kv_tokens * per_token)})


def _step_cost(group: PlanGroup, calibration: Calibration | None) -> StepCoefficients | None:
    """None where there is no calibration of the shape."""
    cost = None if calibration is None else calibration.engine_cost(group.shape)
    return None if cost is None else StepCoefficients.of(cost)


def _calibrations(plan: Plan) -> dict[str, Calibration]:
    """By type of device, in lower case; empty if the plan has no SLO file, or if the file does not exist."""
    if plan.slo_file is None or not plan.slo_file.is_file():
        return {}
    section = load_config(plan.slo_file, SloFile).cluster
    return {name.casefold(): calibration for name, calibration in Cluster.of(section).calibrations.items()}


def _check_shapes(plan: Plan) -> None:
    if not plan.groups:
        raise ConfigError("the plan has no instances: no deployment that the planner tried meets the targets")
    if plan.precision != AS_STORED:
        raise ConfigError(
            "the plan is for other numbers than the checkpoint's (precision), which Tandem's engine does not compute "
            "in; plan without precision"
        )
    if any(group.dp > 1 for group in plan.groups):
        raise ConfigError(
            "the plan divides experts over ranks with sequences of their own (dp), which this engine does not do; "
            "plan with --set search.max_dp=1"
        )


def _check_machine(plan: Plan, machine: Machine) -> None:
    nodes = {node_of(rank) for group in plan.groups for ranks in group.devices for rank in ranks}
    if len(nodes) > max(machine.nodes, 1):
        have = f"the Ray cluster has {machine.nodes}" if machine.nodes else "this is one machine"
        raise ConfigError(
            f"the plan uses {len(nodes)} nodes, and {have}; serve it on a Ray cluster with so many "
            "(`tandem serve --ray ADDRESS`), or plan for fewer (cluster.nodes)"
        )
    on_gpu = [group for group in plan.groups if not is_on_cpu(group)]
    needed = sum(group.num_devices for group in on_gpu)
    if needed > machine.gpus:
        here = "the Ray cluster" if machine.nodes else "this machine"
        present = f"has {machine.gpus} GPUs" if machine.gpus else "has no GPU"
        raise ConfigError(
            f"the plan needs {needed} x {on_gpu[0].device}, but {here} {present}; plan for devices that are there "
            "(for example cluster.nodes.device: cpu)"
        )
