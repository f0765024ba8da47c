"""Prometheus metrics of tenants, where there are API keys.

The label `tenant` is a tenant of the key file, or `other` for one that a gateway's request names: a client cannot
create a time series.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem.core.errors import TandemError
from tandem.router.api_keys import ApiKeyAccess
from tandem.router.metric_descriptions import Description
from tandem.router.records import RequestRecord

_TENANT = ("tenant",)
REQUESTS = Description("tandem_tenant_requests_total", "Requests that have ended", (*_TENANT, "outcome"))
PROMPT_TOKENS = Description("tandem_tenant_prompt_tokens_total", "Prompt tokens of finished requests", _TENANT)
OUTPUT_TOKENS = Description("tandem_tenant_output_tokens_total", "Output tokens of finished requests", _TENANT)
REFUSALS = Description(
    "tandem_tenant_refusals_total", "Requests beyond the limits of their API key", (*_TENANT, "reason")
)
OTHER = "other"


class TenantMetrics(Collector):  # type: ignore[misc]
    """Counts requests when they end. A `RequestObserver`."""

    def __init__(self, keys: ApiKeyAccess, registry: CollectorRegistry) -> None:
        self._keys = keys
        self._requests, self._prompt_tokens, self._output_tokens = (
            Counter(what.name, what.help, what.labels, registry=registry)
            for what in (REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS)
        )
        registry.register(self)

    def finished(self, record: RequestRecord) -> None:
        tenant = self._label(record)
        self._requests.labels(tenant, record.outcome).inc()
        self._prompt_tokens.labels(tenant).inc(record.timeline.num_prompt_tokens)
        self._output_tokens.labels(tenant).inc(record.timeline.num_output_tokens)

    def refused(self, error: TandemError, record: RequestRecord | None = None) -> None:
        """One that the text side refused has no record, and is in the metrics of all requests only."""
        if record is not None:
            self._requests.labels(self._label(record), record.outcome).inc()

    def _label(self, record: RequestRecord) -> str:
        return record.tenant if record.tenant in self._keys.tenants else OTHER

    def collect(self) -> Iterator[Metric]:
        refusals = CounterMetricFamily(REFUSALS.name, REFUSALS.help, labels=REFUSALS.labels)
        for (tenant, reason), count in self._keys.refusals().items():
            refusals.add_metric([tenant, reason], count)
        yield refusals
