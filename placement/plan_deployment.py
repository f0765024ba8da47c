"""From a plan to what the simulator runs: instances on nodes, with their costs, and the links between them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tandem.core.errors import ConfigError
from tandem.core.kv_codec import KvCodec, KvCodecName
from tandem.core.model_shape import ModelShape
from tandem.core.parallel import ParallelShape
from tandem.core.plan import Plan, PlanGroup
from tandem.core.step_coefficients import StepCoefficients
from tandem.placement.cluster import Cluster, ClusterNode, nic_bytes_per_s, peer_bytes_per_s
from tandem.placement.costs.cost_source import CostSource
from tandem.placement.costs.resharding import Resharding, ShapePair, resharding_of
from tandem.placement.costs.serving import ServingCosts
from tandem.placement.planned_router import planned_router
from tandem.placement.simulator.deployment import (
    Deployment,
    Failure,
    InstanceSpec,
    KvCoding,
    NetworkSpec,
    RouterSpec,
)
from tandem.scheduling.routing_settings import RoutingSettings

BLOCK_SIZE = 16


def deployment_of(
    plan: Plan,
    source: CostSource,
    cluster: Cluster,
    model: ModelShape,
    *,
    failures: Sequence[Failure] = (),
) -> Deployment:
    """Instances are named prefill-0, prefill-1, ..., decode-0, ..., in the order of the plan's groups. Those without
    devices of their own are placed as `placed` says.

    The router is the one that `tandem serve` starts for the plan, and instances know their step times where these are
    calibrated, as there. Times of the router and the wire are those of the calibrations, 0 without. Raises ConfigError
    if the plan does not fit the cluster, or asks for a shape of which no cost is known, and for a failure of an
    instance that is not there.
    """
    if not plan.groups:
        raise ConfigError("the plan has no groups, so there is nothing to run")
    whole = placed(plan, cluster)
    numbers = {"prefill": 0, "decode": 0, "colocated": 0}
    instances: list[InstanceSpec] = []
    for group in whole.groups:
        calibration = cluster.calibrations.get(_device_name(group, cluster))
        serving = ServingCosts() if calibration is None else calibration.serving_of(group.shape)
        is_calibrated = calibration is not None and calibration.engine_cost(group.shape) is not None
        cost = source.cost_model(_device_name(group, cluster), group.shape)
        if cost is None:
            raise ConfigError(
                f"the plan: {model.name} cannot run as {group.shape} on {group.device}, or no cost is known"
            )
        step_cost = StepCoefficients.of(cost) if is_calibrated else None
        for ranks in group.devices:
            instances.append(
                InstanceSpec(
                    instance_id=f"{group.role}-{numbers[group.role]}",
                    role=group.role,
                    cost=cost,
                    num_blocks=max(1, group.kv_tokens // BLOCK_SIZE),
                    block_size=BLOCK_SIZE,
                    max_model_len=model.max_context_tokens,
                    max_batch_tokens=group.max_batch_tokens,
                    max_batch=group.max_batch,
                    max_prefill_tokens=group.max_prefill_tokens,
                    policy=group.policy,
                    node=_node_index(ranks[0], cluster),
                    shape=group.shape,
                    request_admission_cost_s=serving.request_admission_cost_s if group.role == "decode" else 0.0,
                    cold_step_factor=serving.cold_step_factor if group.role == "prefill" else 0.0,
                    step_cost=step_cost,
                )
            )
            numbers[group.role] += 1
    return Deployment(
        instances=tuple(instances),
        network=network_of(whole, cluster, model),
        router=router_of(plan, cluster, has_step_costs=any(each.step_cost is not None for each in instances)),
        failures=_checked(failures, instances),
    )


def router_of(plan: Plan, cluster: Cluster, *, has_step_costs: bool) -> RouterSpec:
    """With the settings of `planned_router`, and the slowest times that were measured. `has_step_costs`: whether an
    instance reports any."""
    measured = [calibration.router_spec() for calibration in cluster.calibrations.values()]
    section = planned_router(plan)
    routing = RoutingSettings.of(section)
    return RouterSpec(
        admission_s=max((one.admission_s for one in measured), default=0.0),
        first_token_s=max((one.first_token_s for one in measured), default=0.0),
        token_s=max((one.token_s for one in measured), default=0.0),
        same_node_only=plan.same_node,
        request_timeout_s=section.request_timeout_s,
        slo=tuple(slo.request_slo for slo in section.slo),
        # Without step costs "goodput" decides as "balanced" does, but in more time.
        routing=routing if has_step_costs else replace(routing, policy="balanced"),
    )


def network_of(plan: Plan, cluster: Cluster, model: ModelShape) -> NetworkSpec:
    """Links of the slowest kind among the nodes in use: an instance's port has the links of all its ranks, a node's
    link those of all its devices. What a calibration measured on its node counts instead of the catalogue."""
    ports, links, latency_s, per_concurrent_transfer_s, kv_bytes = [], [], 0.0, 0.0, model.kv_bytes_per_token
    resharding: dict[ShapePair, Resharding] = {}
    for group in plan.groups:
        device = cluster.devices[_device_name(group, cluster)]
        links.append(cluster.devices_per_node[device.name] * nic_bytes_per_s(device))
        calibration = cluster.calibrations.get(device.name)
        if calibration is None:
            ports.append(group.shape.num_ranks * peer_bytes_per_s(device))
        else:
            measured = calibration.network_spec()
            ports.append(measured.intra_node_bytes_per_s)
            latency_s = max(latency_s, measured.latency_s)
            per_concurrent_transfer_s = max(per_concurrent_transfer_s, measured.per_concurrent_transfer_s)
            kv_bytes = measured.kv_bytes_per_token
            resharding |= resharding_of(calibration.transfers, BLOCK_SIZE)
    return NetworkSpec(
        kv_bytes_per_token=kv_bytes,
        coding=coding_of(plan.kv_codec, model, kv_bytes),
        intra_node_bytes_per_s=min(ports),
        inter_node_bytes_per_s=min(links),
        latency_s=latency_s,
        per_concurrent_transfer_s=per_concurrent_transfer_s,
        resharding=resharding,
    )


def coding_of(codec: KvCodecName, model: ModelShape, kv_bytes_per_token: float) -> KvCoding | None:
    """Of KV that takes so many bytes in memory. None: it is sent as it is."""
    if codec == "none":
        return None
    element_bytes = model.kv_bytes * kv_bytes_per_token / model.kv_bytes_per_token
    return KvCoding(KvCodec(codec), BLOCK_SIZE, model.head_dim, element_bytes)


def placed(plan: Plan, cluster: Cluster) -> Plan:
    """The plan with the devices of every instance named.

    Large instances go first. An instance stays inside a node if one has room. With `same_node` it goes to the node
    with most room, so that both roles come to stand on every node; else nodes are filled one after the other. Raises
    ConfigError if there are too few devices, or a device that the plan names is not there.
    """
    room = _Room(cluster)
    for group in plan.groups:
        for ranks in group.devices:
            room.take(ranks, group.device)
    chosen: dict[int, list[tuple[str, ...]]] = {}
    for index in sorted(range(len(plan.groups)), key=lambda i: -plan.groups[i].shape.num_ranks):
        group = plan.groups[index]
        if not group.devices:
            name = _device_name(group, cluster)
            chosen[index] = [room.find(name, group.shape, spread=plan.same_node) for _ in range(group.instances)]
    groups = tuple(
        group.model_copy(update={"devices": tuple(chosen[index])}) if index in chosen else group
        for index, group in enumerate(plan.groups)
    )
    return plan.model_copy(update={"groups": groups})


@dataclass(slots=True)
class _NodeRoom:
    node: ClusterNode
    free: list[int]


class _Room:
    """The devices that nobody has taken yet."""

    def __init__(self, cluster: Cluster) -> None:
        self._nodes = [_NodeRoom(node, list(range(node.num_devices))) for node in cluster.nodes]

    def take(self, ranks: Sequence[str], device_name: str) -> None:
        for rank in ranks:
            name, _, index = rank.rpartition(":")
            room = next((room for room in self._nodes if room.node.name == name), None)
            if room is None or not index.isdecimal() or int(index) not in room.free:
                raise ConfigError(f"the plan: the cluster has no device {rank}, or it is used twice")
            if room.node.device.name.casefold() != device_name.casefold():
                raise ConfigError(f"the plan: device {rank} is a {room.node.device.name}, not a {device_name}")
            room.free.remove(int(index))

    def find(self, device_name: str, shape: ParallelShape, *, spread: bool) -> tuple[str, ...]:
        """Devices of one node; where none has room for all stages, each stage finds a node of its own."""
        fitting = [room for room in self._nodes if room.node.device.name == device_name]
        with_room = [room for room in fitting if len(room.free) >= shape.num_ranks]
        if not with_room and shape.pp > 1:
            stages = (self.find(device_name, ParallelShape(shape.tp), spread=spread) for _ in range(shape.pp))
            return tuple(rank for stage in stages for rank in stage)
        if not with_room:
            have = sum(room.node.num_devices for room in fitting)
            raise ConfigError(
                f"the plan: the cluster's {have} {device_name} have no room left for an instance of {shape}"
            )
        room = max(with_room, key=lambda room: len(room.free)) if spread else with_room[0]
        found = tuple(f"{room.node.name}:{index}" for index in room.free[: shape.num_ranks])
        self.take(found, device_name)
        return found


def _device_name(group: PlanGroup, cluster: Cluster) -> str:
    """The group's device as the cluster spells it. Raises ConfigError."""
    for name in cluster.devices:
        if name.casefold() == group.device.casefold():
            return name
    raise ConfigError(f"the plan wants {group.device}, but the cluster has {', '.join(cluster.devices)}")


def _node_index(device: str, cluster: Cluster) -> int:
    name = device.rpartition(":")[0]
    return next(index for index, node in enumerate(cluster.nodes) if node.name == name)


def _checked(failures: Sequence[Failure], instances: Sequence[InstanceSpec]) -> tuple[Failure, ...]:
    names = [instance.instance_id for instance in instances]
    for failure in failures:
        if failure.instance_id not in names:
            raise ConfigError(f"there is no instance {failure.instance_id} to fail; there are {', '.join(names)}")
    return tuple(failures)
