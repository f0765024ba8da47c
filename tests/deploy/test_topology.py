from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.config import RouterConfig, ServeConfig, WorkerConfig
from tandem.core.errors import ConfigError
from tandem.core.instance_section import EngineSection, InstanceSection
from tandem.deploy.topology import Machine, ProcessRole, ProcessSpec, plan_processes, share_threads


def serve_config(prefill: int = 1, decode: int = 1, **engine: object) -> ServeConfig:
    section = EngineSection.model_validate(engine)
    return ServeConfig(
        model=Path("/models/x"),
        prefill=(InstanceSection(instances=prefill, engine=section),),
        decode=(InstanceSection(instances=decode, engine=section),),
        cluster_token="secret",
    )


def workers(specs: tuple[ProcessSpec, ...]) -> list[ProcessSpec]:
    return [spec for spec in specs if spec.role is not ProcessRole.ROUTER]


@given(prefill=st.integers(1, 20), decode=st.integers(1, 20), cores=st.integers(1, 256))
def test_every_instance_has_a_thread_and_no_core_is_idle(prefill: int, decode: int, cores: int) -> None:
    specs = plan_processes(serve_config(prefill, decode), Machine(cores))
    threads = [spec.threads for spec in workers(specs)]
    assert len(threads) == prefill + decode
    assert min(threads) >= 1
    assert sum(threads) == max(cores, prefill + decode)
    assert max(threads) - min(threads) <= 1


@given(cores=st.integers(1, 128), fixed=st.lists(st.integers(0, 16), min_size=1, max_size=12))
def test_chosen_threads_stay_and_the_rest_is_shared(cores: int, fixed: list[int]) -> None:
    shares = share_threads(cores, fixed)
    assert all(share == chosen for share, chosen in zip(shares, fixed, strict=True) if chosen)
    sharing = [share for share, chosen in zip(shares, fixed, strict=True) if not chosen]
    assert all(share >= 1 for share in sharing)
    assert not sharing or sum(sharing) == max(cores - sum(fixed), len(sharing))


def test_what_each_process_is_given() -> None:
    specs = plan_processes(serve_config(prefill=2, decode=1), Machine(cores=7))
    assert [spec.name for spec in specs] == ["router-0", "prefill-0", "prefill-1", "decode-0"]
    router, first, _, decode = specs
    assert isinstance(router.config, RouterConfig)
    assert isinstance(first.config, WorkerConfig)
    assert isinstance(decode.config, WorkerConfig)
    assert [spec.threads for spec in workers(specs)] == [3, 2, 2]
    assert (first.config.role, first.config.instance.engine.threads) == ("prefill", 3)
    assert (decode.config.role, decode.config.instance.engine.threads) == ("decode", 2)
    assert first.config.routers == (router.config.router.control,)
    assert {spec.config.cluster_token for spec in specs} == {"secret"}
    assert {spec.config.served_name for spec in specs} == {"x"}
    assert {spec.gpus for spec in specs} == {0.0}


@given(prefill=st.integers(1, 8), decode=st.integers(1, 8), gpus=st.integers(1, 16))
def test_gpus_are_shared_so_that_all_fit(prefill: int, decode: int, gpus: int) -> None:
    specs = workers(plan_processes(serve_config(prefill, decode), Machine(cores=8, gpus=gpus)))
    share = specs[0].gpus
    assert 0.0 < share <= 1.0
    assert all(spec.gpus == share for spec in specs)
    per_device = int(1.0 / share + 1e-9)
    assert per_device * gpus >= len(specs), "Ray must find a place for each"
    assert (share == 1.0) == (gpus >= len(specs))


def test_a_cpu_device_takes_no_gpu() -> None:
    specs = plan_processes(serve_config(device="cpu"), Machine(cores=8, gpus=4))
    assert {spec.gpus for spec in specs} == {0.0}


def test_several_kinds_of_a_role_and_colocated_instances_beside_them() -> None:
    config = ServeConfig.model_validate(
        {
            "model": "/models/x",
            "cluster_token": "secret",
            "prefill": [{"instances": 1, "max_batch_tokens": 64}, {"instances": 2, "max_batch_tokens": 128}],
            "decode": {},
            "colocated": {"policy": "prompt_first"},
        }
    )
    specs = workers(plan_processes(config, Machine(cores=5)))
    assert [spec.name for spec in specs] == ["prefill-0", "prefill-1", "prefill-2", "decode-0", "colocated-0"]
    instances = [spec.config.instance for spec in specs if isinstance(spec.config, WorkerConfig)]
    assert [instance.max_batch_tokens for instance in instances[:3]] == [64, 128, 128]
    assert instances[4].policy == "prompt_first"
    assert {instance.instances for instance in instances} == {1}


def colocated(machine: Machine, instances: int = 1, **engine: object) -> list[ProcessSpec]:
    section = InstanceSection(instances=instances, engine=EngineSection.model_validate(engine))
    return workers(plan_processes(ServeConfig(model=Path("/m"), colocated=(section,), cluster_token="x"), machine))


def test_an_instance_of_several_ranks_is_one_process_with_the_resources_of_all() -> None:
    (spec,) = colocated(Machine(cores=1), device="cpu", tp=2, pp=2)
    assert (spec.threads, spec.gpus) == (4, 0.0), "each rank computes on a thread at least"
    specs = colocated(Machine(cores=8, gpus=4), instances=2, device="cuda", tp=2)
    assert [spec.gpus for spec in specs] == [2.0, 2.0]


def test_ranks_of_one_instance_do_not_share_a_gpu() -> None:
    with pytest.raises(ConfigError, match="4 ranks on GPUs, and this machine has 3"):
        colocated(Machine(cores=8, gpus=3), instances=2, device="cuda", tp=2)
