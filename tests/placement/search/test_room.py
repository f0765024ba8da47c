"""What is said to fit has a place, and every device is given away once."""

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.parallel import ParallelShape
from tandem.core.slo_file import ClusterSection, NodeSection
from tandem.placement.cluster import Cluster
from tandem.placement.search.fleet import Fleet, Pool
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.search.problem import NodeType
from tandem.placement.search.room import beside, capacity, places
from tests.placement.search.problems import A100, ToyCost

SHAPES = st.builds(ParallelShape, st.sampled_from((1, 2, 3, 4)), st.sampled_from((1, 2, 4)))


def kind(role: str, shape: ParallelShape) -> InstanceKind:
    return InstanceKind(role, A100, shape, 1000, 512, 8, cost=ToyCost(1.0))  # type: ignore[arg-type]


@given(st.integers(1, 8), st.integers(1, 5), SHAPES, SHAPES, st.data())
def test_what_fits_has_a_place_of_its_own(
    devices: int, count: int, first: ParallelShape, second: ParallelShape, data: st.DataObject
) -> None:
    nodes = (NodeType(A100, devices, count),)
    most = capacity(nodes, kind("prefill", first))
    instances = data.draw(st.integers(0, most))
    pools = [Pool(kind("prefill", first), instances)] if instances else []
    fitting = beside(nodes, pools, kind("decode", second))
    fleet = Fleet((*pools, *([Pool(kind("decode", second), fitting)] if fitting else [])))
    cluster = Cluster.of(ClusterSection(nodes=(NodeSection(device=A100, devices=devices, count=count),)))
    names = [name for instances_of in places(fleet, cluster) for ranks in instances_of for name in ranks]
    assert len(names) == len(set(names)) == fleet.num_devices
    assert fleet.num_devices <= devices * count


@given(st.integers(1, 8), st.integers(1, 5), SHAPES)
def test_one_more_never_fits(devices: int, count: int, shape: ParallelShape) -> None:
    nodes = (NodeType(A100, devices, count),)
    most = capacity(nodes, kind("prefill", shape))
    if most:
        assert beside(nodes, [Pool(kind("prefill", shape), most)], kind("prefill", shape)) == 0
