"""From a plan to the serve file that runs it, and what cannot be run yet."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tandem.core.config import RouterConfig
from tandem.core.config_file import dump_config
from tandem.core.errors import ConfigError
from tandem.core.plan import Plan, PlanGroup
from tandem.core.precision import Precision
from tandem.core.router_section import RouterSection
from tandem.core.slo import SloClass
from tandem.deploy.plan_serving import planned_nodes, serve_config_of
from tandem.deploy.topology import Machine, plan_processes
from tandem.models.random_checkpoint import CheckpointShape, write_random_checkpoint
from tandem.placement.costs.calibration import Calibration
from tandem.placement.costs.step_fit import FitError, Terms
from tandem.placement.planned_router import planned_router
from tests.placement.planned import plan_of

BUILT_IN = Path(__file__).parents[2] / "models" / "tiny-python"
LAPTOP = Machine(cores=4)


def group(role: str, **settings: Any) -> PlanGroup:
    return PlanGroup.model_validate({"role": role, "instances": 1, "device": "cpu", "kv_tokens": 1000} | settings)


def test_instances_batches_and_memory_are_as_planned() -> None:
    plan = plan_of(
        BUILT_IN,
        [
            group("prefill", instances=2, max_batch_tokens=512, kv_tokens=4000, devices=(("0:0",), ("0:1",))),
            group("decode", max_batch=24, kv_tokens=1600, devices=(("0:2",),)),
        ],
    )
    config = serve_config_of(plan, LAPTOP)
    assert config.model == BUILT_IN
    (prefill,), (decode,) = config.prefill, config.decode
    assert (prefill.instances, prefill.max_batch_tokens) == (2, 512)
    assert (decode.instances, decode.max_batch) == (1, 24)
    assert prefill.engine.device == decode.engine.device == "cpu"
    assert prefill.engine.kv_memory == 2.5 * decode.engine.kv_memory
    per_token = decode.engine.kv_memory / 1600
    assert per_token == 4 * 2 * 2 * 32 * 4, "layers, K and V, KV heads, numbers of a head, bytes of float32"


def test_memory_is_for_the_numbers_that_the_engine_computes_in(tmp_path: Path) -> None:
    """bf16 where the CPU multiplies it. Other machines' CPUs are not known, and a float32 checkpoint stays as it is."""
    groups = [group("colocated", kv_tokens=1600)]

    def memory(machine: Machine, model: Path = BUILT_IN) -> int:
        return serve_config_of(plan_of(model, groups), machine).colocated[0].engine.kv_memory

    numbers = 1600 * 4 * 2 * 2 * 32  # layers, K and V, KV heads, numbers of a head
    assert memory(Machine(cores=4)) == 4 * numbers
    assert memory(Machine(cores=4, multiplies_bf16=True)) == 2 * numbers
    assert memory(Machine(cores=4, nodes=2, multiplies_bf16=True)) == 4 * numbers
    whole = write_random_checkpoint(tmp_path / "whole", CheckpointShape(), dtype="float32")
    assert memory(Machine(cores=4), whole) == memory(Machine(cores=4, multiplies_bf16=True), whole)


def test_requests_of_a_served_plan_may_name_its_classes() -> None:
    chat = SloClass(name="chat", ttft_s=0.5, tpot_s=0.05)
    plan = plan_of(BUILT_IN, [group("colocated")]).model_copy(update={"slo": (chat,)})
    config = serve_config_of(plan, LAPTOP).model_copy(update={"cluster_token": "secret"})
    router = plan_processes(config, LAPTOP)[0].config
    assert isinstance(router, RouterConfig)
    assert router.router.slo == (chat,)


def test_the_router_of_a_served_plan_is_the_one_that_was_simulated() -> None:
    """It takes as many requests as a large cluster decodes at once, and as many that wait."""
    slo = (SloClass(name="chat", ttft_s=0.5, tpot_s=0.05),)
    small, large = (plan_of(BUILT_IN, [group("colocated", max_batch=n)]) for n in (64, 1000))
    for plan, max_queue in ((small, RouterSection().max_queue), (large, 2000)):
        plan = plan.model_copy(update={"slo": slo})
        router = serve_config_of(plan, LAPTOP).router
        assert router == planned_router(plan)
        assert router == RouterSection(slo=slo, max_queue=max_queue)


def test_groups_that_differ_only_in_their_place_are_one() -> None:
    plan = plan_of(BUILT_IN, [group("prefill"), group("decode"), group("decode", instances=2)])
    (decode,) = serve_config_of(plan, LAPTOP).decode
    assert decode.instances == 3


def test_kinds_of_a_role_and_colocated_groups_are_served_as_planned() -> None:
    plan = plan_of(
        BUILT_IN,
        [
            group("prefill"),
            group("decode", max_batch=2),
            group("decode", max_batch=8, instances=2),
            group("colocated", policy="prompt_first", max_batch_tokens=256),
        ],
    )
    config = serve_config_of(plan, LAPTOP)
    assert [(section.instances, section.max_batch) for section in config.decode] == [(1, 2), (2, 8)]
    assert [(section.policy, section.max_batch_tokens) for section in config.colocated] == [("prompt_first", 256)]
    alone = serve_config_of(plan_of(BUILT_IN, [group("colocated")]), LAPTOP)
    assert [role for role, _ in alone.kinds] == ["colocated"]


def test_a_calibration_says_threads_and_dtype(tmp_path: Path) -> None:
    calibration = Calibration(
        measured_on=date(2026, 11, 21),
        device="some CPU",
        cores=4,
        model="tiny-python",
        weights_hash="x",
        dtype="bfloat16",
        ops="torch",
        threads=2,
        kv_bytes_per_token=100.0,
        kv_memory_bytes=1 << 20,
        terms=Terms(linear=((1, 0.001),), attention_per_pair=0, kv_read=((1, 0),), kv_per_sequence=0, head=0,
                    head_per_sampled=0),
        error=FitError(median=0.05, mean=0.05, worst=0.1, fitted_median=0.02),
    )  # fmt: skip
    (tmp_path / "laptop.yaml").write_text(dump_config(calibration))
    slo_path = tmp_path / "slo.yaml"
    slo_path.write_text(
        f"model: {BUILT_IN}\n"
        "cluster: {nodes: [{device: cpu, devices: 2, calibration: laptop.yaml}]}\n"
        "slo: [{ttft_s: 1, tpot_s: 0.1}]\n"
        "workload: {dataset: sharegpt}\n"
    )
    plan = plan_of(BUILT_IN, [group("prefill"), group("decode")]).model_copy(update={"slo_file": slo_path})
    engine = serve_config_of(plan, LAPTOP).prefill[0].engine
    assert (engine.threads, engine.dtype, engine.kv_memory) == (2, "bfloat16", 100_000)
    gone = plan.model_copy(update={"slo_file": tmp_path / "gone.yaml"})
    assert serve_config_of(gone, LAPTOP).prefill[0].engine.threads == 0


def test_instances_of_several_ranks_are_served_in_every_role() -> None:
    groups = [group("prefill", tp=2, pp=2), group("decode"), group("colocated", tp=2), group("colocated", pp=2)]
    config = serve_config_of(plan_of(BUILT_IN, groups), LAPTOP)
    shapes = [(role, str(section.engine.shape)) for role, section in config.kinds]
    assert shapes == [("prefill", "tp2pp2"), ("decode", "tp1"), ("colocated", "tp2"), ("colocated", "tp1pp2")]


def test_planned_gpus_that_are_here_are_used() -> None:
    plan = plan_of(BUILT_IN, [group("prefill", device="H100"), group("decode", device="H100", instances=2)])
    config = serve_config_of(plan, Machine(cores=4, gpus=3))
    assert {section.engine.device for _, section in config.kinds} == {"cuda"}


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (
            [group("prefill", devices=(("0:0",),)), group("decode", devices=(("1:0",),))],
            ["uses 2 nodes", "one machine"],
        ),
        ([group("prefill"), group("decode", device="H100", instances=2)], ["needs 2 x H100", "has no GPU"]),
        ([group("colocated", dp=2)], ["divides experts over ranks", "search.max_dp=1"]),
    ],
)
def test_what_cannot_be_run_yet_is_said_with_what_could_be_done(groups: list[PlanGroup], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        serve_config_of(plan_of(BUILT_IN, groups), LAPTOP)
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message


def test_processes_are_on_the_nodes_of_their_devices() -> None:
    """Groups of one kind are one kind of processes, numbered as they come."""
    groups = [
        group("prefill", devices=(("b:0",),)),
        group("decode", instances=2, devices=(("a:1",), ("b:1",)), device="H100"),
        group("prefill", instances=2, devices=(("a:2",), ("b:2",))),
        group("colocated"),
    ]
    found = planned_nodes(plan_of(BUILT_IN, groups))
    nodes = {"prefill-0": "b", "prefill-1": "a", "prefill-2": "b", "decode-0": "a", "decode-1": "b"}
    assert found.of_process == {name: ((node, 1),) for name, node in nodes.items()}
    assert found.gpus == {"a": 1, "b": 1}


def test_a_plan_of_two_nodes_is_for_a_ray_cluster_of_two() -> None:
    groups = [group("prefill", devices=(("0:0",),)), group("decode", devices=(("1:0",),))]
    assert serve_config_of(plan_of(BUILT_IN, groups), Machine(cores=8, nodes=2)).kinds


def test_an_instance_on_several_nodes_is_for_a_ray_cluster_of_so_many() -> None:
    plan = plan_of(BUILT_IN, [group("colocated", tp=2, pp=2, device="H100", devices=(("0:1", "0:2", "1:0", "1:1"),))])
    (section,) = serve_config_of(plan, Machine(cores=8, gpus=8, nodes=2)).colocated
    assert str(section.engine.shape) == "tp2pp2"
    found = planned_nodes(plan)
    assert found.of_process == {"colocated-0": (("0", 2), ("1", 2))}
    assert found.gpus == {"0": 2, "1": 2}
    assert not found.keeps_kv
    assert planned_nodes(plan.model_copy(update={"same_node": True})).keeps_kv
    for machine, words in ((Machine(cores=8, gpus=8), "this is one machine"), (Machine(8, 8, 1), "Ray cluster has 1")):
        with pytest.raises(ConfigError, match=rf"uses 2 nodes, and .*{words}.*tandem serve --ray ADDRESS"):
            serve_config_of(plan, machine)


def test_the_ranks_of_one_node_follow_each_other() -> None:
    with pytest.raises(ValueError, match=r"mixes the nodes of an instance \(0:0, 1:0, 0:1\); list node after node"):
        group("colocated", pp=3, devices=(("0:0", "1:0", "0:1"),))


def test_other_numbers_than_the_checkpoints_are_not_served() -> None:
    plan = plan_of(BUILT_IN, [group("colocated")]).model_copy(update={"precision": Precision(weights="fp8")})
    with pytest.raises(ConfigError, match="other numbers than the checkpoint's"):
        serve_config_of(plan, LAPTOP)


def test_a_plan_that_nothing_meets_runs_nothing() -> None:
    with pytest.raises(ConfigError, match="no instances"):
        serve_config_of(Plan(model=str(BUILT_IN), verdict="infeasible", groups=()), LAPTOP)
