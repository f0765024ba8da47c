"""Which node of a Ray cluster a process is put on; the nodes are only values."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.config import WorkerConfig
from tandem.core.errors import UnavailableError
from tandem.core.instance_section import EngineSection, InstanceSection
from tandem.deploy.node_placement import NodePlacement, PlannedNodes, RayNode, Seat
from tandem.deploy.topology import ProcessRole, ProcessSpec

A, B = RayNode("a", "10.0.0.1", {"CPU": 4.0}), RayNode("b", "10.0.0.2", {"CPU": 4.0})
CONFIG = WorkerConfig(model=Path("/m"))
NODES = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), min_size=1, max_size=4).map(
    lambda sizes: [RayNode(f"n{i}", f"h{i}", {"CPU": cores, "GPU": gpus}) for i, (cores, gpus) in enumerate(sizes)]
)


def spec(role: ProcessRole, index: int, gpus: float = 0.0) -> ProcessSpec:
    return ProcessSpec(role, index, "entry", CONFIG, threads=1, gpus=gpus, shares_cores=True)


def one_node(placement: NodePlacement, process: ProcessSpec, nodes: list[RayNode]) -> str:
    (seat,) = placement.choose(process, nodes)
    return seat.node_id


def four() -> list[ProcessSpec]:
    return [spec(role, index) for role in (ProcessRole.PREFILL, ProcessRole.DECODE) for index in range(2)]


def test_equal_nodes_get_a_pair_each() -> None:
    placement = NodePlacement()
    chosen = {each.name: one_node(placement, each, [A, B]) for each in four()}
    assert chosen == {"prefill-0": "a", "prefill-1": "b", "decode-0": "a", "decode-1": "b"}


def test_what_was_on_a_node_that_died_goes_where_there_is_room_and_a_new_node_fills() -> None:
    placement = NodePlacement()
    for each in four():
        placement.choose(each, [A, B])
    for each in (spec(ProcessRole.PREFILL, 1), spec(ProcessRole.DECODE, 1)):
        placement.release(each.name)
        assert one_node(placement, each, [A]) == "a"
    assert one_node(placement, spec(ProcessRole.DECODE, 2), [A, RayNode("c", B.host, {"CPU": 4.0})]) == "c"


def test_each_node_of_the_plan_has_a_node_of_its_own() -> None:
    """The larger one is left for what needs it, whatever is placed first."""
    small, large = RayNode("small", "h0", {"CPU": 4.0, "GPU": 1.0}), RayNode("large", "h1", {"CPU": 4.0, "GPU": 4.0})
    of_process = {"decode-0": (("y", 1),), "prefill-0": (("x", 1),), "prefill-1": (("x", 1),)}
    placement = NodePlacement(lambda: PlannedNodes(of_process, {"x": 2, "y": 1}))
    decode, *prefill = spec(ProcessRole.DECODE, 0, 1.0), *(spec(ProcessRole.PREFILL, i, 1.0) for i in range(2))
    assert one_node(placement, decode, [large, small]) == "small"
    assert [one_node(placement, each, [large, small]) for each in prefill] == ["large", "large"]
    placement.release(decode.name)
    assert one_node(placement, decode, [large]) == "large", "its node is gone"
    placement.release(decode.name)
    assert one_node(placement, decode, [large, RayNode("back", "h0", small.resources)]) == "back"


def test_who_could_go_back_to_the_node_of_the_plan() -> None:
    of_process = {f"{role}-{index}": ((node, 1),) for role in ("prefill", "decode") for index, node in enumerate("xy")}
    placement = NodePlacement(lambda: PlannedNodes(of_process))
    for each in four():
        placement.choose(each, [A, B])
    assert placement.misplaced([A, B]) == ()
    for each in (spec(ProcessRole.PREFILL, 1), spec(ProcessRole.DECODE, 1)):
        placement.release(each.name)
        placement.choose(each, [A])
    assert placement.misplaced([A]) == ()
    assert placement.misplaced([A, RayNode("back", B.host, B.resources)]) == ("prefill-1", "decode-1")
    full = RayNode("full", B.host, {"CPU": 0.0015})
    assert NodePlacement.misplaced(placement, [A, full]) == ("prefill-1",), "there is room for one"


@given(NODES, st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), max_size=12))
def test_no_node_gets_more_gpus_than_it_has(nodes: list[RayNode], gpus: list[float]) -> None:
    placement = NodePlacement()
    taken = dict.fromkeys((node.node_id for node in nodes), 0.0)
    for index, number in enumerate(gpus):
        process = spec(ProcessRole.COLOCATED, index, number)
        try:
            chosen = one_node(placement, process, nodes)
        except UnavailableError:
            if number:
                assert all(taken[each.node_id] + number > each.gpus for each in nodes)
            else:
                assert all(not each.cores for each in nodes)
            continue
        taken[chosen] += number
        (node,) = (each for each in nodes if each.node_id == chosen)
        assert node.gpus >= taken[node.node_id]
        assert number or node.cores


def test_where_no_node_has_room_it_says_what_is_needed() -> None:
    with pytest.raises(UnavailableError, match="has room for decode-0, which needs 2 GPU"):
        NodePlacement().choose(spec(ProcessRole.DECODE, 0, 2.0), [A, B])


def test_an_instance_goes_where_its_custom_resources_are() -> None:
    instance = InstanceSection(ray_resources={"fast": 1.0})
    wants = replace(spec(ProcessRole.DECODE, 0), config=CONFIG.model_copy(update={"instance": instance}))
    fast = RayNode("f", "10.0.0.3", {"CPU": 1.0, "fast": 1.0})
    placement = NodePlacement()
    assert one_node(placement, wants, [A, fast, B]) == "f"
    with pytest.raises(UnavailableError, match=r"needs 0\.001 CPU and 1 fast"):
        placement.choose(replace(wants, index=1), [A, fast, B])


def parallel(shape: dict[str, int], threads: int, gpus: float = 0.0) -> ProcessSpec:
    instance = InstanceSection(engine=EngineSection(threads=threads, **shape))
    config = CONFIG.model_copy(update={"instance": instance})
    return ProcessSpec(ProcessRole.COLOCATED, 0, "entry", config, threads=threads, gpus=gpus)


def test_an_instance_that_no_node_has_room_for_is_on_as_few_as_possible() -> None:
    large = RayNode("l", "10.0.0.4", {"CPU": 6.0})
    placement = NodePlacement()
    wanted = parallel({"tp": 2, "pp": 3}, threads=12)
    assert placement.choose(wanted, [A, B, large]) == (Seat("l", 3), Seat("a", 2), Seat("b", 1))
    assert placement.choose(parallel({"pp": 2}, threads=2), [large]) == (Seat("l", 2),)
    with pytest.raises(UnavailableError, match="colocated-0"):
        placement.choose(parallel({"pp": 2}, threads=20), [A, B, large])


def test_what_is_on_several_nodes_takes_room_on_each() -> None:
    placement = NodePlacement()
    nodes = [RayNode(name, name, {"CPU": 8.0, "GPU": 2.0}) for name in ("x", "y")]
    wanted = parallel({"tp": 3}, threads=3, gpus=3.0)
    assert placement.choose(wanted, nodes) == (Seat("x", 2), Seat("y", 1))
    left = spec(ProcessRole.DECODE, 0, 1.0)
    assert one_node(placement, left, nodes) == "y"
    with pytest.raises(UnavailableError):
        placement.choose(replace(left, index=1), nodes)
    placement.put(wanted, [Seat("y", 2), Seat("x", 1)])
    placement.release(left.name)
    assert one_node(placement, left, nodes) == "x"
    placement.release(wanted.name)
    assert one_node(placement, replace(left, index=1), nodes) == "y"


def test_ranks_are_on_the_nodes_of_the_plan() -> None:
    """Also where one node has room for all of them; rank 0 on the plan's first node."""
    wanted, beside = parallel({"pp": 3}, threads=3), spec(ProcessRole.DECODE, 0)
    of_process = {wanted.name: (("x", 1), ("y", 2)), beside.name: (("x", 1),)}
    placement = NodePlacement(lambda: PlannedNodes(of_process))
    assert one_node(placement, beside, [A, B]) == "a"
    assert placement.choose(wanted, [A, B]) == (Seat("a", 1), Seat("b", 2))
    placement.release(wanted.name)
    assert placement.choose(wanted, [A]) == (Seat("a", 3),), "one of its nodes is gone"


def test_a_node_stands_for_the_plans_where_its_ranks_fit() -> None:
    """Whichever of the two the first rank is for."""
    small, large = RayNode("small", "h0", {"CPU": 2.0}), RayNode("large", "h1", {"CPU": 4.0})
    wanted = parallel({"pp": 3}, threads=6)
    for planned, seats in (
        ((("x", 2), ("y", 1)), (Seat("large", 2), Seat("small", 1))),
        ((("x", 1), ("y", 2)), (Seat("small", 1), Seat("large", 2))),
    ):
        placement = NodePlacement(lambda planned=planned: PlannedNodes({wanted.name: planned}))
        assert placement.choose(wanted, [large, small]) == seats


def test_an_instance_goes_back_to_the_nodes_of_its_plan() -> None:
    """What it has on one of them itself is no obstacle."""
    wanted, planned = parallel({"pp": 2}, threads=4), [PlannedNodes()]
    placement = NodePlacement(lambda: planned[0])
    assert placement.choose(wanted, [A, B]) == (Seat("a", 2),)
    assert placement.misplaced([A, B]) == ()
    planned[0] = PlannedNodes({wanted.name: (("x", 1), ("y", 1))})
    assert placement.misplaced([A]) == (), "nothing stands for the second one"
    assert placement.misplaced([A, B]) == (wanted.name,)
    placement.release(wanted.name)
    assert placement.choose(wanted, [A, B]) == (Seat("a", 1), Seat("b", 1))
    assert placement.misplaced([A, B]) == ()
    placement.put(wanted, [Seat("b", 1), Seat("a", 1)])
    assert placement.misplaced([A, B]) == (wanted.name,), "rank 0 is on the other one"


def test_where_kv_stays_on_a_node_each_node_has_a_plan_epoch() -> None:
    """An instance that was started without it, or with another one, is to be started again."""
    keeps = [True]
    placement = NodePlacement(lambda: PlannedNodes({"prefill-0": (("x", 1),)}, keeps_kv=keeps[0]))
    started = {}
    for each in (spec(ProcessRole.PREFILL, 0), spec(ProcessRole.DECODE, 0)):
        (seat,) = placement.choose(each, [A, B])
        epoch = placement.plan_epoch_on(seat.node_id)
        started[seat.node_id] = WorkerConfig.model_validate(CONFIG.model_dump() | {"plan_epoch": epoch})
        placement.put(replace(each, config=started[seat.node_id]), [seat])
    assert started["a"].plan_epoch != started["b"].plan_epoch
    assert placement.misplaced([A, B]) == ()
    keeps[0] = False
    assert placement.plan_epoch_on("a") is None
    assert placement.misplaced([A, B]) == ("prefill-0", "decode-0")
    assert placement.misplaced([A]) == ("prefill-0",), "the other one's node is gone"


def test_who_is_started_again_where_it_is_needs_no_room_beside_itself() -> None:
    node = RayNode("n", "10.0.0.9", {"CPU": 2.0})
    keeps = [False]
    placement = NodePlacement(lambda: PlannedNodes(keeps_kv=keeps[0]))
    both = [replace(parallel({}, threads=1), index=index) for index in range(2)]
    for each in both:
        placement.choose(each, [node])
    keeps[0] = True
    assert placement.misplaced([node]) == ("colocated-0", "colocated-1")


def test_settings_that_change_a_planned_shape_leave_it_on_its_first_node() -> None:
    placement = NodePlacement(lambda: PlannedNodes({"colocated-0": (("x", 1), ("y", 1))}))
    assert placement.choose(parallel({"pp": 4}, threads=4), [A, B]) == (Seat("a", 4),)
