"""What a plan says of measured instances of several ranks: which shapes are slower than smaller ones, and what KV
between instances of two shapes takes."""

from collections.abc import Iterator

from tandem.core.instance_section import RoleName
from tandem.placement.costs.resharding import resharding_of
from tandem.placement.plan_deployment import BLOCK_SIZE
from tandem.placement.search.candidate import CandidateDeployment
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
    between = [] if deployment is None else _transfers(space, deployment)
    return tuple(f"{sentence}." for sentence in (*slower, *between))


def _instance(role: RoleName | None) -> str:
    return "instance" if role is None else f"{role} instance"


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
