"""Chooses a node of a Ray cluster for each process. Ray is not asked here: its nodes come in as values.

A process of a plan goes to the node that stands for the plan's node; each of the plan's nodes has a node of its own.
Every other process, and one whose node is gone, goes to the node with the least load that has room. An instance of
several ranks that no node has room for goes to several.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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
class PlannedNodes:
    """Where a plan puts its instances. `of_process`: the process's name -> the plan's node; `gpus`: how many the plan
    uses of each of its nodes."""

    of_process: Mapping[str, str] = field(default_factory=dict)
    gpus: Mapping[str, int] = field(default_factory=dict)


def machine_of(nodes: Sequence[RayNode]) -> Machine:
    """What processes divide: all nodes together."""
    cores, gpus = (sum(int(getattr(node, kind)) for node in nodes) for kind in ("cores", "gpus"))
    return Machine(max(cores, 1), gpus, max(len(nodes), 1))


def num_ranks_of(spec: ProcessSpec) -> int:
    return spec.config.instance.engine.shape.num_ranks if isinstance(spec.config, WorkerConfig) else 1


def bundle_of(spec: ProcessSpec, num_ranks: int | None = None) -> Bundle:
    """What an instance, or so many of its ranks, need: GPUs, or the cores of an instance on CPUs whose number is a
    setting; and what its settings name, on each of its nodes."""
    assert isinstance(spec.config, WorkerConfig), "a router needs no resources"
    share = 1.0 if num_ranks is None else num_ranks / num_ranks_of(spec)
    cores = _ANY_CORE if spec.shares_cores else spec.threads * share
    return ({"GPU": spec.gpus * share} if spec.gpus else {"CPU": cores}) | dict(spec.config.instance.ray_resources)


class NodePlacement:
    """Knows which instance is on which node: `choose` puts it there, `release` when it has ended. `planned` is asked
    each time, since a plan may be applied to a running cluster."""

    def __init__(self, planned: Callable[[], PlannedNodes] = PlannedNodes) -> None:
        self._planned = planned
        self._stands_for: dict[str, str] = {}  # the plan's node -> node id
        self._placed: dict[str, list[tuple[str, Bundle]]] = {}  # process -> node ids, and what it needs there

    def choose(self, spec: ProcessSpec, nodes: Sequence[RayNode]) -> RayNode:
        """Raises UnavailableError if no node has room."""
        bundle = bundle_of(spec)
        fitting = [node for node in nodes if self._has_room(node, bundle)]
        if not fitting:
            raise no_room(spec)
        wanted = self._planned().of_process.get(spec.name)
        planned = None if wanted is None else self._node_for(wanted, nodes)
        chosen = planned if planned in fitting else None
        if chosen is None:
            chosen = min(fitting, key=lambda node: self._load(node, "GPU" in bundle))
        self.put(spec, [chosen.node_id])
        return chosen

    def spread(self, spec: ProcessSpec, nodes: Sequence[RayNode]) -> tuple[int, ...]:
        """For an instance that no node has room for: the numbers of its ranks on as few nodes as possible. Raises
        UnavailableError if all nodes together have no room."""
        fitting = sorted(((self._num_fitting(spec, node), node) for node in nodes), key=lambda found: -found[0])
        left, seats = num_ranks_of(spec), list[tuple[int, RayNode]]()
        for fits, node in fitting:
            if (number := min(fits, left)) > 0:
                seats.append((number, node))
                left -= number
        if left:
            raise no_room(spec)
        self._placed[spec.name] = [(node.node_id, bundle_of(spec, number)) for number, node in seats]
        return tuple(number for number, _ in seats)

    def put(self, spec: ProcessSpec, node_ids: Sequence[str], per_node: Sequence[int] = ()) -> None:
        """The instance is there, whatever was chosen; on several nodes with so many ranks on each."""
        numbers = per_node or (None,)
        self._placed[spec.name] = [
            (node_id, bundle_of(spec, number)) for node_id, number in zip(node_ids, numbers, strict=True)
        ]

    def release(self, name: str) -> None:
        self._placed.pop(name, None)

    def misplaced(self, nodes: Sequence[RayNode]) -> tuple[str, ...]:
        """Processes that could be on the node of their plan, all of them together, and are not."""
        planned, found = self._planned().of_process, dict[str, tuple[str, Bundle]]()
        for name, ((node_id, bundle), *others) in self._placed.items():
            node = self._node_for(planned[name], nodes) if name in planned else None
            if node is None or node.node_id == node_id or others:
                continue
            coming = [other for there, other in found.values() if there == node.node_id]
            if self._has_room(node, bundle, coming):
                found[name] = (node.node_id, bundle)
        return tuple(found)

    def _there(self, node: RayNode) -> list[Bundle]:
        return [bundle for seats in self._placed.values() for node_id, bundle in seats if node_id == node.node_id]

    def _num_fitting(self, spec: ProcessSpec, node: RayNode) -> int:
        """How many of the instance's ranks the node has room for."""
        numbers = range(num_ranks_of(spec), 0, -1)
        return next((number for number in numbers if self._has_room(node, bundle_of(spec, number))), 0)

    def _has_room(self, node: RayNode, bundle: Bundle, coming: Sequence[Bundle] = ()) -> bool:
        there = [*self._there(node), *coming]
        return all(
            sum(taken.get(kind, 0.0) for taken in there) + number <= node.resources.get(kind, 0.0) + _ROUNDING
            for kind, number in bundle.items()
        )

    def _load(self, node: RayNode, on_gpu: bool) -> tuple[float, int]:
        """The share of the node that is taken, then the number of its instances."""
        there = self._there(node)
        share = sum(taken.get("GPU", 0.0) for taken in there) / node.gpus if on_gpu else len(there) / node.cores
        return share, len(there)

    def _node_for(self, wanted: str, nodes: Sequence[RayNode]) -> RayNode | None:
        """The node that stands for the plan's; None if each node that is large enough stands for another one."""
        by_id = {node.node_id: node for node in nodes}
        standing = self._stands_for.get(wanted)
        if standing in by_id:
            return by_id[standing]
        gpus = self._planned().gpus
        others = {node_id for name, node_id in self._stands_for.items() if name != wanted}
        free = [node for node in nodes if node.node_id not in others and node.gpus >= gpus.get(wanted, 0)]
        if not free:
            return None
        found = min(free, key=lambda node: node.gpus)  # larger ones stay for larger nodes of the plan
        self._stands_for[wanted] = found.node_id
        return found


def no_room(spec: ProcessSpec) -> UnavailableError:
    needs = " and ".join(f"{number:g} {kind}" for kind, number in bundle_of(spec).items())
    return UnavailableError(f"no node of the Ray cluster has room for {spec.name}, which needs {needs}")
