"""The four metrics by which gateways choose among model servers, under the names that vLLM gives them.

They are for a gateway in front of several Tandem clusters: each router is one model server to it. See the model server
protocol of the Gateway API Inference Extension (docs/proposals/003-model-server-protocol).
"""

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem.core.session import Role
from tandem.router.dispatch import Dispatcher
from tandem.router.metric_descriptions import Description
from tandem.scheduling.known_instance import KnownInstance

_LABELS = ("model_name", "engine")
WAITING = Description("vllm:num_requests_waiting", "Requests that wait for their first token", _LABELS)
RUNNING = Description("vllm:num_requests_running", "Requests that have their first token", _LABELS)
KV_USAGE = Description("vllm:kv_cache_usage_perc", "Share of KV memory in use, 0 to 1, where it is scarcest", _LABELS)
CONFIG = Description(
    "vllm:cache_config_info", "KV memory of the instances that decode", (*_LABELS, "block_size", "num_gpu_blocks")
)
_ENGINE = "0"  # vLLM numbers the engines of one server
_DECODES = (Role.DECODE, Role.COLOCATED)


class VllmMetrics(Collector):  # type: ignore[misc]
    """Reads the live state at each scrape. A cluster without an instance that decodes has no memory to report."""

    def __init__(self, dispatcher: Dispatcher, model: str) -> None:
        self._dispatcher = dispatcher
        self._labels = [model, _ENGINE]

    def collect(self) -> Iterator[Metric]:
        yield self._gauge(WAITING, self._dispatcher.queued_requests)
        yield self._gauge(RUNNING, self._dispatcher.running_requests)
        usable = [instance for instance in self._dispatcher.fleet.instances if instance.is_usable]
        decoding = [instance for instance in usable if instance.role in _DECODES]
        if not decoding:
            return
        others = [instance for instance in usable if instance.role not in _DECODES]
        yield self._gauge(KV_USAGE, max(_kv_usage(decoding), _kv_usage(others)))
        block_size = max(instance.status.block_size for instance in decoding)
        num_tokens = sum(each.status.blocks.total * each.status.block_size for each in decoding)
        config = GaugeMetricFamily(CONFIG.name, CONFIG.help, labels=CONFIG.labels)
        config.add_metric([*self._labels, str(block_size), str(num_tokens // block_size)], 1.0)
        yield config

    def _gauge(self, what: Description, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(what.name, what.help, labels=what.labels)
        gauge.add_metric(self._labels, value)
        return gauge


def _kv_usage(instances: list[KnownInstance]) -> float:
    """Cached prefixes count as free, as in vLLM: they can be evicted."""
    blocks = [instance.status.blocks for instance in instances]
    total = sum(each.total for each in blocks)
    return 1.0 - sum(each.free + each.cached for each in blocks) / total if total else 0.0
