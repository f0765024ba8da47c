"""The metrics that other gateways read, as they are on the page."""

from prometheus_client.parser import text_string_to_metric_families

from tandem.core.session import BlockCounts, Role
from tandem.router.metrics import Metrics
from tests.router.fakes import Cluster, make_request, make_status, running_cluster


def read(cluster: Cluster) -> dict[str, tuple[dict[str, str], float]]:
    page = Metrics()
    page.add_vllm_names(cluster.dispatcher, "tiny")
    families = text_string_to_metric_families(page.render().decode())
    samples = [sample for family in families for sample in family.samples if sample.name.startswith("vllm:")]
    return {sample.name: (sample.labels, sample.value) for sample in samples}


async def test_a_cluster_is_one_model_server() -> None:
    async with running_cluster("p1", "d1", "d2") as cluster:
        nearly_full = BlockCounts(total=100, free=10, running=60, cached=20, leased=10)
        half_full = BlockCounts(total=300, free=100, running=150, cached=50, leased=0)
        cluster.report(make_status("p1", Role.PREFILL, blocks=BlockCounts(50, 40, 0, 0, 10)))
        cluster.report(make_status("d1", Role.DECODE, blocks=nearly_full))
        cluster.report(make_status("d2", Role.DECODE, blocks=half_full, block_size=8))
        running = cluster.start(make_request())
        labels = {"model_name": "tiny", "engine": "0"}
        assert read(cluster) == {
            "vllm:num_requests_waiting": (labels, 1.0),
            "vllm:num_requests_running": (labels, 0.0),
            "vllm:kv_cache_usage_perc": (labels, (70 + 150) / 400),
            "vllm:cache_config_info": (labels | {"block_size": "16", "num_gpu_blocks": "250"}, 1.0),
        }
        cluster.report(make_status("p1", Role.PREFILL, blocks=BlockCounts(50, 5, 20, 0, 25)))
        assert read(cluster)["vllm:kv_cache_usage_perc"][1] == 0.9, "prefill has the scarcer memory"
        await running.aclose()


async def test_without_instances_there_is_no_memory_to_report() -> None:
    async with running_cluster() as cluster:
        assert set(read(cluster)) == {"vllm:num_requests_waiting", "vllm:num_requests_running"}
