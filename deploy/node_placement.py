"""Chooses a node of a Ray cluster for each process. Ray is not asked here: its nodes come in as values.

The ranks of a plan's instance go to the nodes that stand for the plan's nodes; each of the plan's nodes has a node of
its own. Every other process, and one whose nodes are gone, goes to the node with the least load that has room. An
instance of several ranks that no node has room for goes to several.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from tandem.core.config import WorkerConfig
from tandem.core.errors import UnavailableError
from tandem.deploy.topology import Machine, ProcessSpec

Bundle = Mapping[str, float]
"""Ray's resources, by name: CPU, GPU and custom ones."""
_ANY_CORE = 0.001  # a node without cores gets no instances; those that share the cores of a node reserve none
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node of the Ray cluster that is alive. `host` is its address; `resources` are all that Ray has there."""

    node_id: str
    host: str
    resources: Bundle

    @property
    def cores(self) -> float:
        return self.resources.get("CPU", 0.0)

    @property
    def gpus(self) -> float:
        return self.resources.get("GPU", 0.0)


@dataclass(frozen=True, slots=True)
class Seat:
    """A node with some of an instance's ranks, or with all of them. The seats of an instance are in the order of its
    ranks: rank 0 is in the first one."""

    node_id: str
    num_ranks: int


Seated = tuple[ProcessSpec, tuple[Seat, ...]]
"""An instance and where it is."""


@dataclass(frozen=True, slots=True)
class PlannedNodes:
    """Where a plan puts its instances. `of_process`: the process's name -> the plan's nodes in the order of its ranks,
    with the number of ranks on each; `gpus`: how many the plan uses of each of its nodes; `keeps_kv`: KV moves only
    between instances with rank 0 on one node."""

    of_process: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    gpus: Mapping[str, int] = field(default_factory=dict)
    keeps_kv: bool = False


def machine_of(nodes: Sequence[RayNode]) -> Machine:
    """What processes divide: all nodes together."""
    cores, gpus = (sum(int(getattr(node, kind)) for node in nodes) for kind in ("cores", "gpus"))
    return Machine(max(cores, 1), gpus, max(len(nodes), 1))


def num_ranks_of(spec: ProcessSpec) -> int:
    return spec.config.instance.engine.shape.num_ranks if isinstance(spec.config, WorkerConfig) else 1


def bundle_of(spec: ProcessSpec, num_ranks: int) -> Bundle:
    """What `num_ranks` ranks of an instance need on a node: GPUs, or cores on CPUs where their number is a setting; and
    what its settings name, on each of its nodes."""
    assert isinstance(spec.config, WorkerConfig), "a router needs no resources"
    share = num_ranks / num_ranks_of(spec)
    cores = _ANY_CORE if spec.shares_cores else spec.threads * share
    return ({"GPU": spec.gpus * share} if spec.gpus else {"CPU": cores}) | dict(spec.config.instance.ray_resources)


class NodePlacement:
    """Knows which instance is on which nodes: `choose` puts it there, `release` when it has ended. `planned` is asked
    each time, since a plan may be applied to a running cluster."""

    def __init__(self, planned: Callable[[], PlannedNodes] = PlannedNodes) -> None:
        self._planned = planned
        self._stands_for: dict[str, str] = {}  # the plan's node -> node id
        self._placed: dict[str, Seated] = {}  # by the process's name

    def choose(self, spec: ProcessSpec, nodes: Sequence[RayNode]) -> tuple[Seat, ...]:
        """On the nodes of its plan if they have room, else on one node if one has, else on as few as possible. Raises
        UnavailableError if all nodes together have no room."""
        seats = self._seats_of_plan(spec, nodes)
        if not seats or not self._have_room(seats, spec, nodes):
            seats = self._seat_on_one(spec, nodes) or self._seats_on_few(spec, nodes)
        self._placed[spec.name] = (spec, seats)
        return seats

    def plan_epoch_on(self, node_id: str) -> str | None:
        """Of instances with rank 0 there: each node has its own where KV does not leave it."""
        return f"node-{node_id}" if self._planned().keeps_kv else None

    def put(self, spec: ProcessSpec, seats: Sequence[Seat]) -> None:
        """The instance is there, whatever was chosen, with the plan epoch in `spec`."""
        self._placed[spec.name] = (spec, tuple(seats))

    def release(self, name: str) -> None:
        self._placed.pop(name, None)

    def misplaced(self, nodes: Sequence[RayNode]) -> tuple[str, ...]:
        """Processes that could be on the nodes of their plan, all of them together, and are not, or have another plan
        epoch there than the plan says."""
        found: dict[str, Seated] = {}
        for name, (spec, seats) in self._placed.items():
            wanted = self._seats_of_plan(spec, nodes) or seats
            epoch = spec.config.plan_epoch if isinstance(spec.config, WorkerConfig) else None
            is_right = wanted == seats and epoch == self.plan_epoch_on(seats[0].node_id)
            if not is_right and self._have_room(wanted, spec, nodes, found):
                found[name] = (spec, wanted)
        return tuple(found)

    # --- seats -------------------------------------------------------------------------------------------------------

    def _seats_of_plan(self, spec: ProcessSpec, nodes: Sequence[RayNode]) -> tuple[Seat, ...]:
        """Whether they have room or not; none where the plan says nothing, or no node stands for one of its nodes."""
        planned = self._planned().of_process.get(spec.name, ())
        if sum(number for _, number in planned) != num_ranks_of(spec):  # settings beside the plan's have changed it
            planned = tuple((name, num_ranks_of(spec)) for name, _ in planned[:1])
        seats = []
        for name, number in planned:
            node = self._node_for(name, nodes, spec, number)
            if node is None:
                return ()
            seats.append(Seat(node.node_id, number))
        return tuple(seats)

    def _seat_on_one(self, spec: ProcessSpec, nodes: Sequence[RayNode]) -> tuple[Seat, ...]:
        """The node with the least load; none if no node has room for all ranks."""
        number = num_ranks_of(spec)
        fitting = [node for node in nodes if self._has_room(node, spec, number)]
        if not fitting:
            return ()
        on_gpu = "GPU" in bundle_of(spec, number)
        return (Seat(min(fitting, key=lambda node: self._load(node, on_gpu)).node_id, number),)

    def _seats_on_few(self, spec: ProcessSpec, nodes: Sequence[RayNode]) -> tuple[Seat, ...]:
        """On the nodes with room for most ranks. Raises UnavailableError."""
        fitting = sorted(((self._num_fitting(spec, node), node) for node in nodes), key=lambda found: -found[0])
        left, seats = num_ranks_of(spec), list[Seat]()
        for fits, node in fitting:
            if (number := min(fits, left)) > 0:
                seats.append(Seat(node.node_id, number))
                left -= number
        if left:
            raise no_room(spec)
        return tuple(seats)

    # --- room --------------------------------------------------------------------------------------------------------

    def _have_room(
        self,
        seats: Sequence[Seat],
        spec: ProcessSpec,
        nodes: Sequence[RayNode],
        moved: Mapping[str, Seated] = MappingProxyType({}),
    ) -> bool:
        """For the instance, beside all others, of which some have `moved`."""
        by_id = {node.node_id: node for node in nodes}
        return all(
            seat.node_id in by_id and self._has_room(by_id[seat.node_id], spec, seat.num_ranks, moved) for seat in seats
        )

    def _has_room(
        self, node: RayNode, spec: ProcessSpec, num_ranks: int, moved: Mapping[str, Seated] = MappingProxyType({})
    ) -> bool:
        others = [placed for name, placed in {**self._placed, **moved}.items() if name != spec.name]
        there = _bundles_on(node, others)
        return all(
            sum(taken.get(kind, 0.0) for taken in there) + number <= node.resources.get(kind, 0.0) + _ROUNDING
            for kind, number in bundle_of(spec, num_ranks).items()
        )

    def _num_fitting(self, spec: ProcessSpec, node: RayNode) -> int:
        """How many of the instance's ranks the node has room for."""
        numbers = range(num_ranks_of(spec), 0, -1)
        return next((number for number in numbers if self._has_room(node, spec, number)), 0)

    def _load(self, node: RayNode, on_gpu: bool) -> tuple[float, int]:
        """The share of the node that is taken, then the number of its instances."""
        there = _bundles_on(node, self._placed.values())
        share = sum(taken.get("GPU", 0.0) for taken in there) / node.gpus if on_gpu else len(there) / node.cores
        return share, len(there)

    def _node_for(self, wanted: str, nodes: Sequence[RayNode], spec: ProcessSpec, num_ranks: int) -> RayNode | None:
        """The node that stands for the plan's; else a node that is large enough for the plan's, has room for these
        ranks and stands for no other one. None if there is none."""
        by_id = {node.node_id: node for node in nodes}
        standing = self._stands_for.get(wanted)
        if standing in by_id:
            return by_id[standing]
        gpus = self._planned().gpus.get(wanted, 0)
        others = {node_id for name, node_id in self._stands_for.items() if name != wanted}
        free = [node for node in nodes if node.node_id not in others and node.gpus >= gpus]
        fitting = [node for node in free if self._has_room(node, spec, num_ranks)]
        if not fitting:
            return None
        found = min(fitting, key=lambda node: (node.gpus, node.cores))  # larger ones stay for the plan's larger nodes
        self._stands_for[wanted] = found.node_id
        return found


def _bundles_on(node: RayNode, placed: Iterable[Seated]) -> list[Bundle]:
    return [bundle_of(spec, seat.num_ranks) for spec, seats in placed for seat in seats if seat.node_id == node.node_id]


def no_room(spec: ProcessSpec) -> UnavailableError:
    needs = " and ".join(f"{number:g} {kind}" for kind, number in bundle_of(spec, num_ranks_of(spec)).items())
    return UnavailableError(f"no node of the Ray cluster has room for {spec.name}, which needs {needs}")
