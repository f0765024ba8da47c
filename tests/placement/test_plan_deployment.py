"""Plans become instances on nodes, each on devices of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from tandem.core.cost_model import CostModel
from tandem.core.errors import ConfigError
from tandem.core.kv_codec import KvCodec
from tandem.core.parallel import ParallelShape
from tandem.core.plan import Plan
from tandem.core.router_section import RouterSection
from tandem.core.slo_file import ClusterSection
from tandem.placement.cluster import Cluster, nic_bytes_per_s, peer_bytes_per_s
from tandem.placement.costs.models import model_shape
from tandem.placement.plan_deployment import deployment_of, placed
from tandem.placement.simulator.deployment import Failure, KvCoding
from tandem.scheduling.routing_settings import RoutingSettings
from tests.placement.simulator.deployments import LinearCost
from tests.placement.test_cluster import write_calibration

H100, A100 = "H100-80GB-SXM5", "A100-80GB-SXM4"
MODEL = model_shape("Llama-3.1-8B")


class AnySource:
    """Knows every shape but tp 3."""

    error = 0.0

    def cost_model(self, device: str, shape: ParallelShape) -> CostModel | None:
        return None if shape.tp == 3 else LinearCost()

    def kv_tokens(self, device: str, shape: ParallelShape) -> int:
        return 10_000


def cluster(*nodes: dict[str, Any]) -> Cluster:
    return Cluster.of(ClusterSection.model_validate({"nodes": nodes}))


def group(role: str, instances: int = 1, **settings: Any) -> dict[str, Any]:
    return {"role": role, "instances": instances, "device": H100, "kv_tokens": 10_000} | settings


def plan(*groups: dict[str, Any], **settings: Any) -> Plan:
    return Plan.model_validate({"model": "m", "verdict": "mixed", "groups": groups} | settings)


def devices_of(answer: Plan) -> list[tuple[str, ...]]:
    return [ranks for group in answer.groups for ranks in group.devices]


def test_a_group_becomes_its_instances() -> None:
    deployment = deployment_of(
        plan(group("prefill", 2, tp=2, max_batch_tokens=4096), group("decode", max_batch=99), group("colocated")),
        AnySource(),
        cluster({"device": H100}),
        MODEL,
    )
    assert [one.instance_id for one in deployment.instances] == ["prefill-0", "prefill-1", "decode-0", "colocated-0"]
    prefill, _, decode, _ = deployment.instances
    assert prefill.max_batch_tokens == 4096
    assert decode.max_batch == 99
    assert prefill.num_blocks == 10_000 // prefill.block_size
    assert prefill.max_model_len == MODEL.max_context_tokens
    assert not deployment.router.same_node_only


def test_links_are_those_of_the_nodes_in_use() -> None:
    both = cluster({"device": H100}, {"device": A100, "devices": 4})
    slow, fast = both.devices[A100], both.devices[H100]
    on_both = deployment_of(plan(group("prefill", tp=2), group("decode", device=A100, tp=4)), AnySource(), both, MODEL)
    assert on_both.network.kv_bytes_per_token == MODEL.kv_bytes_per_token
    assert on_both.network.intra_node_bytes_per_s == min(2 * peer_bytes_per_s(fast), 4 * peer_bytes_per_s(slow))
    assert on_both.network.inter_node_bytes_per_s == 4 * nic_bytes_per_s(slow)
    on_one = deployment_of(plan(group("prefill", tp=2), group("decode", tp=4)), AnySource(), both, MODEL)
    assert on_one.network.inter_node_bytes_per_s == 8 * nic_bytes_per_s(fast)


def test_what_was_measured_reaches_the_simulator(tmp_path: Path) -> None:
    measured = cluster({"device": "cpu", "devices": 2, "calibration": str(write_calibration(tmp_path / "c.yaml"))})
    answer = plan(group("prefill", device="cpu"), group("decode", device="cpu"), same_node=True)
    deployment = deployment_of(answer, AnySource(), measured, MODEL)
    assert deployment.router.admission_s == 0.002
    assert deployment.router.first_token_s == 0.001
    assert deployment.router.token_s == 0.0005
    assert deployment.router.same_node_only
    assert deployment.network.latency_s == 0.003
    assert deployment.network.intra_node_bytes_per_s == 1e9
    assert deployment.network.kv_bytes_per_token == 2048


def test_the_router_and_what_it_knows_are_those_of_the_served_plan(tmp_path: Path) -> None:
    """Step times are known where they are calibrated; without them the choice is that of the policy "balanced"."""
    calibrated = cluster({"device": "cpu", "calibration": str(write_calibration(tmp_path / "c.yaml"))})
    chat = {"name": "chat", "ttft_s": 1.0, "tpot_s": 0.1, "weight": 2.0}
    for where, device, policy in ((calibrated, "cpu", "goodput"), (cluster({"device": H100}), H100, "balanced")):
        answer = plan(group("colocated", device=device), slo=[chat])
        served = deployment_of(answer, AnySource(), where, MODEL)
        assert served.router.routing == replace(RoutingSettings.of(RouterSection()), policy=policy)
        assert served.router.slo == tuple(slo.request_slo for slo in answer.slo)
        assert served.router.request_timeout_s == RouterSection().request_timeout_s
        assert [each.step_cost is not None for each in served.instances] == [policy == "goodput"]
    parallel = deployment_of(plan(group("colocated", device="cpu", tp=2)), AnySource(), calibrated, MODEL)
    assert parallel.instances[0].step_cost is None, "this shape was not measured"


def test_kv_is_coded_as_the_plan_says() -> None:
    two = cluster({"device": H100, "count": 2})
    answer = plan(group("prefill"), group("decode"))
    assert deployment_of(answer, AnySource(), two, MODEL).network.coding is None
    coded = deployment_of(answer.model_copy(update={"kv_codec": "int8"}), AnySource(), two, MODEL)
    assert coded.network.coding == KvCoding(KvCodec.INT8, 16, 128, 2.0)


def test_kv_that_stays_inside_a_node_finds_both_roles_on_every_node() -> None:
    two = cluster({"device": H100, "count": 2})
    answer = plan(group("prefill", 2, tp=4), group("decode", 2, tp=2), same_node=True)
    nodes = [(one.role, one.node) for one in deployment_of(answer, AnySource(), two, MODEL).instances]
    assert sorted(nodes) == [("decode", 0), ("decode", 1), ("prefill", 0), ("prefill", 1)]
    packed = answer.model_copy(update={"same_node": False})
    assert [one.node for one in deployment_of(packed, AnySource(), two, MODEL).instances] == [0, 0, 1, 1]


def test_devices_that_the_plan_names_are_kept() -> None:
    answer = plan(group("prefill", devices=[["1:7"]]), group("decode", 2, tp=4))
    whole = placed(answer, cluster({"device": H100, "count": 2}))
    assert devices_of(whole)[0] == ("1:7",)
    assert "1:7" not in [rank for ranks in devices_of(whole)[1:] for rank in ranks]
    assert deployment_of(whole, AnySource(), cluster({"device": H100, "count": 2}), MODEL).instances[0].node == 1


def test_stages_may_stand_on_different_nodes_but_ranks_of_a_stage_may_not() -> None:
    two = cluster({"device": H100, "devices": 3, "count": 2})
    (ranks,) = devices_of(placed(plan(group("colocated", tp=2, pp=2)), two))
    assert [rank.partition(":")[0] for rank in ranks] == ["0", "0", "1", "1"]
    with pytest.raises(ConfigError, match=r"have no room left for an instance of tp4"):
        placed(plan(group("colocated", tp=4)), two)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 2), st.sampled_from([1, 2, 4, 8]), st.integers(1, 2)), max_size=3, min_size=1
    ),
    nodes=st.integers(2, 6),
    same_node=st.booleans(),
)
def test_no_device_is_given_twice(groups: list[tuple[int, int, int]], nodes: int, same_node: bool) -> None:
    asked = plan(*(group("colocated", n, tp=tp, pp=pp) for n, tp, pp in groups), same_node=same_node)
    here = cluster({"device": H100, "count": nodes})
    try:
        whole = placed(asked, here)
    except ConfigError:
        reject()
    assert asked.num_devices <= sum(node.num_devices for node in here.nodes)
    used = [rank for ranks in devices_of(whole) for rank in ranks]
    assert len(used) == len(set(used)) == asked.num_devices
    for one in whole.groups:  # the ranks of a stage share a node
        for ranks in one.devices:
            for stage in range(one.pp):
                assert len({rank.partition(":")[0] for rank in ranks[stage * one.tp : (stage + 1) * one.tp]}) == 1


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([group("colocated", 9)], f"the cluster's 8 {H100} have no room left for an instance of tp1"),
        ([group("colocated", device="L4")], f"the plan wants L4, but the cluster has {H100}"),
        ([group("colocated", tp=3)], f"Llama-3.1-8B cannot run as tp3 on {H100}, or no cost is known"),
        ([group("colocated", devices=[["0:8"]])], "the cluster has no device 0:8, or it is used twice"),
        ([group("colocated", devices=[["first"]])], "the cluster has no device first, or it is used twice"),
    ],
)
def test_what_does_not_fit_is_told(groups: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        deployment_of(plan(*groups), AnySource(), cluster({"device": H100}), MODEL)
    assert sentence in caught.value.message


def test_a_device_of_another_type_is_told() -> None:
    both = cluster({"device": H100}, {"device": A100})
    with pytest.raises(ConfigError, match=f"device 1:0 is a {A100}, not a {H100}"):
        placed(plan(group("colocated", devices=[["1:0"]])), both)


def test_an_infeasible_plan_cannot_be_run() -> None:
    empty = Plan.model_validate({"model": "m", "verdict": "infeasible", "groups": []})
    with pytest.raises(ConfigError, match="the plan has no groups"):
        deployment_of(empty, AnySource(), cluster({"device": H100}), MODEL)


def test_only_instances_that_are_there_can_fail() -> None:
    one = plan(group("colocated"))
    failed = deployment_of(one, AnySource(), cluster({"device": H100}), MODEL, failures=[Failure("colocated-0", 5.0)])
    assert failed.failures == (Failure("colocated-0", 5.0),)
    with pytest.raises(ConfigError, match="there is no instance decode-0 to fail; there are colocated-0"):
        deployment_of(one, AnySource(), cluster({"device": H100}), MODEL, failures=[Failure("decode-0", 5.0)])
