"""What a plan says of instances of several ranks: what measured steps take beside those of smaller ones, what KV
between instances of two shapes takes, and where nobody has measured that, as between nodes."""

from collections.abc import Iterator

from tandem.core.instance_section import RoleName
from tandem.core.parallel import ParallelShape
from tandem.core.plan import ranks_on_nodes
from tandem.placement.costs.resharding import resharding_of
from tandem.placement.plan_deployment import BLOCK_SIZE
from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.packing import assign_devices
from tandem.placement.search.slower_shapes import ratios_text, typical_loads
from tandem.placement.search.space import SearchSpace

_WORTH_SAYING = 0.05  # relative difference of the time for a byte


def rank_notes(space: SearchSpace, deployment: CandidateDeployment | None) -> tuple[str, ...]:
    """Sentences. `deployment` None: nothing can be planned."""
    calibrated = space.problem.cluster.calibrations
    slower = [
        f"On {shape.device}, {shape.shape} is {shape.reason}, so no {_instance(shape.role)} has this shape"
        for shape in space.kinds.slower
        if shape.device in calibrated
    ]
    faster = list(_not_slower(space))
    between: list[str] = []
    if deployment is not None:
        between += (*_transfers(space, deployment), *_relayed(space, deployment), *_on_several_nodes(space, deployment))
    return tuple(f"{sentence}." for sentence in (*slower, *faster, *between))


def _relayed(space: SearchSpace, deployment: CandidateDeployment) -> Iterator[str]:
    """Of prefill and decode instances of several GPUs."""
    devices = space.problem.cluster.devices
    groups = [*deployment.of_role("prefill"), *deployment.of_role("decode")]
    if any(group.kind.shape.num_ranks > 1 and devices[group.kind.device].family != "cpu" for group in groups):
        yield (
            "The first GPU of an instance relays the KV of its other GPUs through the host's memory; what that takes "
            "has not been measured, and this plan counts the network alone"
        )


def _on_several_nodes(space: SearchSpace, deployment: CandidateDeployment) -> Iterator[str]:
    cluster = space.problem.cluster
    devices = assign_devices(deployment, cluster)
    spread = [
        group.kind
        for group, instances in zip(deployment.groups, devices, strict=True)
        if any(len(ranks_on_nodes(ranks)) > 1 for ranks in instances)
    ]
    if any(kind.role != "colocated" for kind in spread):
        yield (
            "The first rank of an instance on several nodes relays the KV of its ranks on other nodes over the "
            "network; what that takes has not been measured, and this plan counts the way between two instances alone"
        )
    for device, shape in dict.fromkeys((kind.device, kind.shape) for kind in spread):
        if device in cluster.calibrations or shape.num_ranks <= cluster.devices_per_node[device]:
            yield (
                f"On {device}, the steps of {shape} count as on one node, and this plan has it on several; what its "
                "ranks wait for the network is not counted"
            )


def _instance(role: RoleName | None) -> str:
    return "instance" if role is None else f"{role} instance"


def _not_slower(space: SearchSpace) -> Iterator[str]:
    """Of the measured shapes that were left in the search: their times beside those of one rank."""
    problem, left_out = space.problem, {(one.device, one.shape) for one in (*space.kinds.slower, *space.kinds.rejected)}
    kinds = (*space.kinds.prefill, *space.kinds.decode, *space.kinds.colocated)
    loads = typical_loads(problem.requests)
    for device, shape in dict.fromkeys((kind.device, kind.shape) for kind in kinds if kind.num_devices > 1):
        if device not in problem.cluster.calibrations or (device, shape) in left_out:
            continue
        cost, one = (problem.source.cost_model(device, each) for each in (shape, ParallelShape()))
        if cost is not None and one is not None:
            yield f"On {device}, beside one rank, with {shape} {ratios_text(cost, one, loads)}"


def _transfers(space: SearchSpace, deployment: CandidateDeployment) -> Iterator[str]:
    """Of each pair of a prefill and a decode shape that the deployment has."""
    shapes = {
        role: dict.fromkeys((group.kind.device, group.kind.shape) for group in deployment.of_role(role))
        for role in ("prefill", "decode")
    }
    for name, calibration in space.problem.cluster.calibrations.items():
        costs = resharding_of(calibration.transfers, BLOCK_SIZE)
        for source, destination in ((s, d) for s in shapes["prefill"] for d in shapes["decode"]):
            cost = costs.get((source[1], destination[1]))
            if cost is not None and name in (source[0], destination[0]) and abs(cost.factor - 1) > _WORTH_SAYING:
                yield (
                    f"KV from {source[1]} to {destination[1]} takes {cost.factor:.2f} times as long for each byte as "
                    "between instances of one rank"
                )
