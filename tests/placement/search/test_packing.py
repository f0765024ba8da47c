"""Fitting instances have devices, and every device is assigned once."""

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.parallel import ParallelShape
from tandem.core.slo_file import ClusterSection, NodeSection
from tandem.placement.cluster import Cluster
from tandem.placement.search.candidate import CandidateDeployment, InstanceGroup
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.search.packing import assign_devices, count_fitting
from tandem.placement.search.problem import NodeType
from tests.placement.search.problems import A100, ToyCost

SHAPES = st.builds(ParallelShape, st.sampled_from((1, 2, 3, 4)), st.sampled_from((1, 2, 4)))


def kind(role: str, shape: ParallelShape) -> InstanceKind:
    return InstanceKind(role, A100, shape, 1000, 512, 8, cost=ToyCost(1.0))  # type: ignore[arg-type]


@given(st.integers(1, 8), st.integers(1, 5), SHAPES, SHAPES, st.data())
def test_every_fitting_instance_gets_its_own_devices(
    devices: int, count: int, first: ParallelShape, second: ParallelShape, data: st.DataObject
) -> None:
    nodes = (NodeType(A100, devices, count),)
    most = count_fitting(nodes, kind("prefill", first))
    instances = data.draw(st.integers(0, most))
    groups = [InstanceGroup(kind("prefill", first), instances)] if instances else []
    fitting = count_fitting(nodes, kind("decode", second), beside=groups)
    deployment = CandidateDeployment((*groups, *([InstanceGroup(kind("decode", second), fitting)] if fitting else [])))
    cluster = Cluster.of(ClusterSection(nodes=(NodeSection(device=A100, devices=devices, count=count),)))
    names = [name for instances_of in assign_devices(deployment, cluster) for ranks in instances_of for name in ranks]
    assert len(names) == len(set(names)) == deployment.num_devices
    assert deployment.num_devices <= devices * count


@given(st.integers(1, 8), st.integers(1, 5), SHAPES)
def test_no_further_instance_fits(devices: int, count: int, shape: ParallelShape) -> None:
    nodes = (NodeType(A100, devices, count),)
    most = count_fitting(nodes, kind("prefill", shape))
    if most:
        full = [InstanceGroup(kind("prefill", shape), most)]
        assert count_fitting(nodes, kind("prefill", shape), beside=full) == 0
