"""Every form of a cluster gives the tokens of transformers: colocated instances, mixtures, and roles that change."""

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from tandem.core.session import InstanceStatus, Role
from tandem.wire.channels import open_channel
from tandem.wire.sessions import RoleChange, configure_instance
from tests.cluster.harness import Cluster, running_cluster
from tests.cluster.test_same_tokens import check_answers, cluster_tokens, prompts

pytestmark = pytest.mark.unmeasured
VOCAB_SIZE = 4000


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("policy", ["chunked", "prompt_first"])
def test_colocated_instances_alone(built_in_model: Path, tmp_path: Path, policy: str) -> None:
    colocated = {"policy": policy, "max_batch_tokens": 256}  # long prompts go in chunks beside decoding
    with running_cluster(
        built_in_model, tmp_path, num_prefill=0, decode_transports=(), num_colocated=2, colocated=colocated
    ) as cluster:
        prompt_ids = prompts(VOCAB_SIZE)
        answers = asyncio.run(cluster_tokens(cluster, prompt_ids))
        assert all(status.computed_tokens for status in cluster.instances()), "an instance got no request"
        check_answers(cluster, prompt_ids, answers)


@pytest.mark.timeout(300)
def test_requests_of_one_cluster_take_different_paths(built_in_model: Path, tmp_path: Path) -> None:
    with running_cluster(
        built_in_model,
        tmp_path,
        decode_transports=("shared_memory", "gloo"),
        decode_batches=(2, 16),
        num_colocated=1,
        colocated={"max_batch_tokens": 256},
    ) as cluster:
        prompt_ids = prompts(VOCAB_SIZE)
        answers = asyncio.run(cluster_tokens(cluster, prompt_ids))
        statuses = cluster.instances()
        assert all(status.steps for status in statuses), "an instance got no request"
        received = {status.instance_id: sum(link.transfers for link in status.links) for status in statuses}
        assert all(received[status.instance_id] > 0 for status in statuses if status.role is Role.DECODE)
        assert all(received[status.instance_id] == 0 for status in statuses if status.role is not Role.DECODE)
        assert sum(received.values()) < len(prompt_ids), "no request stayed on the colocated instance"
        check_answers(cluster, prompt_ids, answers)


@pytest.mark.timeout(300)
def test_roles_change_while_requests_run(built_in_model: Path, tmp_path: Path) -> None:
    """1 prefill and 2 decode instances become 1 prefill, 1 decode and 1 colocated; then all of them do both phases."""
    with running_cluster(built_in_model, tmp_path, decode_transports=("auto", "auto")) as cluster:
        before = cluster.instances()
        prefill = next(status for status in before if status.role is Role.PREFILL)
        decode = [status for status in before if status.role is Role.DECODE]
        prompt_ids = prompts(VOCAB_SIZE)

        async def load_and_change() -> list[list[int]]:
            load = asyncio.create_task(cluster_tokens(cluster, prompt_ids))
            await asyncio.sleep(0.05)
            await change(decode[0], RoleChange(Role.COLOCATED, max_batch_tokens=128))
            await asyncio.sleep(0.1)
            await change(prefill, RoleChange(Role.COLOCATED, max_batch_tokens=128))
            await change(decode[1], RoleChange(Role.COLOCATED))
            assert not load.done(), "the roles changed too late to matter"
            return await load

        check_answers(cluster, prompt_ids, asyncio.run(load_and_change()))
        after = cluster.instances()
        assert {status.role for status in after} == {Role.COLOCATED}
        assert {status.instance_id for status in after} == {status.instance_id for status in before}, "one was replaced"
        again = asyncio.run(cluster_tokens(cluster, prompt_ids[:16]))
        check_answers(cluster, prompt_ids[:16], again)


async def change(status: InstanceStatus, role_change: RoleChange) -> None:
    async with open_channel(status.address, Cluster.TOKEN) as channel:
        await configure_instance(channel, role_change)


@pytest.mark.timeout(300)
def test_a_decode_instance_computes_prompts_while_no_prefill_instance_is_there(
    built_in_model: Path, tmp_path: Path
) -> None:
    with running_cluster(built_in_model, tmp_path, prefill={"max_batch_tokens": 64}) as cluster:
        prompt_ids, others = prompts(VOCAB_SIZE)[:24], prompts(VOCAB_SIZE)[24:48]

        async def load_and_kill() -> list[list[int]]:
            load = asyncio.create_task(cluster_tokens(cluster, prompt_ids))
            async with asyncio.timeout(20):
                while not (await asyncio.to_thread(cluster.status, "prefill-0")).uncomputed_tokens:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            cluster.kill("prefill-0")
            return await load

        check_answers(cluster, prompt_ids, asyncio.run(load_and_kill()))
        assert cluster.metric("tandem_retries_total") > 0, "the prefill instance had nothing to compute"
        cluster.wait_ready(prefill=0)
        before = _prompt_tokens_of_decode(cluster)
        check_answers(cluster, others, asyncio.run(cluster_tokens(cluster, others)))
        time.sleep(0.5)  # heartbeats
        assert _prompt_tokens_of_decode(cluster) - before >= sum(map(len, others))


def _prompt_tokens_of_decode(cluster: Cluster) -> int:
    """Computed by the decode instance, or found in its prefix cache."""
    (decode,) = [status for status in cluster.instances() if status.role is Role.DECODE]
    return decode.computed_tokens + decode.cached_tokens


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_instances_by_expected_goodput(built_in_model: Path, tmp_path: Path) -> None:
    """The prior is five times too high: instances correct it, and the router learns that from their reports."""
    slow = [1e-2, 1e-3, 1e-3, 1e-3, 1e-6, 1e-7]
    section = {"step_cost": slow, "policy": "slack"}
    router = {"policy": "goodput", "slo": [{"ttft_s": 2.0, "tpot_s": 0.1}]}
    with running_cluster(built_in_model, tmp_path, prefill=section, decode=section, router=router) as cluster:
        prompt_ids = prompts(VOCAB_SIZE)
        answers = asyncio.run(cluster_tokens(cluster, prompt_ids))
        check_answers(cluster, prompt_ids, answers)
        time.sleep(0.5)  # until the next reports
        for status in cluster.instances():
            assert status.step_cost is not None
            assert status.step_cost.step_s < slow[0]
        metrics = httpx.get(f"{cluster.url}/metrics", timeout=10.0).text
        assert 'tandem_prediction_error_ratio{quantile="0.5",time="ttft_remote"}' in metrics
