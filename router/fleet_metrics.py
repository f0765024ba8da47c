"""Prometheus metrics of the fleet: what waits in the router, and what instances report.

Series are per instance at most, never per pair of instances: transfers are summed by transport. `tandem status` lists
the links of each pair.
"""

import sys
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem.core.session import BLOCK_OWNERS, InstanceStatus, LinkStats
from tandem.core.transfer import Transport
from tandem.router.dispatch import Dispatcher
from tandem.router.instance_labels import InstanceLabels
from tandem.router.metric_descriptions import Description
from tandem.scheduling.known_instance import KnownInstance

RUNNING = Description("tandem_running_requests", "Requests that have their first token")
QUEUED = Description("tandem_queued_requests", "Requests that wait for their first token")
HELD = Description("tandem_held_requests", "Requests that wait in the router until an instance has room")
WAIT = Description(
    "tandem_expected_wait_seconds", "How long a newcomer would wait there, at the rate of the last seconds"
)
ROUTER_PYTHON_BLOCKS = Description("tandem_router_python_blocks", "Memory blocks of the router's own Python")
PREDICTION_ERROR = Description(
    "tandem_prediction_error_ratio",
    "Actual against predicted time, minus 1, of the last requests; only where the router predicts",
    ("time", "quantile"),
)

_BY_INSTANCE = ("tandem_instance", "role")  # `instance` is the name that Prometheus gives to what it scrapes
_BY_TRANSPORT = (*_BY_INSTANCE, "transport")
UP = Description("tandem_instance_up", "1 if the instance takes work, 0 if it is registered and does not", _BY_INSTANCE)
OPEN = Description("tandem_instance_open_requests", "Requests that this router has open there", _BY_INSTANCE)
WAITING = Description("tandem_instance_waiting_requests", "Queue length the instance reports", _BY_INSTANCE)
WAITING_TOKENS = Description("tandem_instance_waiting_tokens", "Tokens in that queue", _BY_INSTANCE)
COMPUTING = Description("tandem_instance_running_requests", "Requests being computed there", _BY_INSTANCE)
BLOCKS = Description("tandem_kv_blocks", "KV blocks by owner; all but `total` sum to `total`", (*_BY_INSTANCE, "owner"))
STEP_AGE = Description("tandem_instance_step_age_seconds", "Age of the step in progress", _BY_INSTANCE)
PYTHON_BLOCKS = Description(
    "tandem_instance_python_blocks", "Memory blocks of its Python; without end where something leaks", _BY_INSTANCE
)
STEPS = Description("tandem_instance_steps_total", "Steps of the engine", _BY_INSTANCE)
STEP_SECONDS = Description("tandem_instance_step_seconds_total", "Time of these steps", _BY_INSTANCE)
COMPUTED = Description("tandem_instance_computed_tokens_total", "Tokens computed", _BY_INSTANCE)
CACHE_HITS = Description("tandem_prefix_cache_hit_tokens_total", "Prompt tokens found in its cache", _BY_INSTANCE)
PREEMPTIONS = Description("tandem_preemptions_total", "Sequences preempted, to be computed again", _BY_INSTANCE)
CERTIFICATE = Description(
    "tandem_instance_certificate_not_after_timestamp_seconds",
    "When its certificate expires, in seconds since 1970",
    _BY_INSTANCE,
)
LINKS = Description("tandem_links", "Instances from which this one has received KV lately", _BY_INSTANCE)
TRANSFERS = Description("tandem_transfers_total", "KV transfers to this instance", _BY_TRANSPORT)
TRANSFER_BYTES = Description("tandem_transfer_bytes_total", "Bytes of KV transfers", _BY_TRANSPORT)
STREAMED_BYTES = Description(
    "tandem_transfer_streamed_bytes_total", "Of these, bytes that came while their prompt was computed", _BY_TRANSPORT
)
WIRE_BYTES = Description(
    "tandem_transfer_wire_bytes_total",
    "Bytes sent for KV transfers: none over shared memory, fewer than those of the KV with a codec",
    _BY_TRANSPORT,
)
TRANSFER_SECONDS = Description("tandem_transfer_seconds_total", "Time of KV transfers", _BY_TRANSPORT)
TRANSFER_FAILURES = Description("tandem_transfer_failures_total", "KV transfers that failed", _BY_TRANSPORT)

OTHER_TRANSPORT = "other"
TRANSPORTS = (*(transport.value for transport in Transport), OTHER_TRANSPORT)
ERROR_QUANTILES = (0.1, 0.5, 0.8, 0.9)

_INSTANCE_GAUGES: tuple[tuple[Description, Callable[[KnownInstance], float]], ...] = (
    (UP, lambda instance: float(instance.is_usable)),
    (OPEN, lambda instance: instance.open_requests),
    (WAITING, lambda instance: instance.status.waiting_requests),
    (WAITING_TOKENS, lambda instance: instance.status.uncomputed_tokens + instance.status.unreserved_tokens),
    (COMPUTING, lambda instance: instance.status.running_requests),
    (STEP_AGE, lambda instance: instance.status.step_age_s),
    (PYTHON_BLOCKS, lambda instance: instance.status.allocated_blocks),
    (LINKS, lambda instance: len(instance.status.links)),
)
_INSTANCE_COUNTERS: tuple[tuple[Description, Callable[[InstanceStatus], float]], ...] = (
    (STEPS, lambda status: status.steps),
    (STEP_SECONDS, lambda status: status.step_s),
    (COMPUTED, lambda status: status.computed_tokens),
    (CACHE_HITS, lambda status: status.cached_tokens),
    (PREEMPTIONS, lambda status: status.preemptions),
)
_TRANSFER_COUNTERS: tuple[tuple[Description, Callable[[LinkStats], float]], ...] = (
    (TRANSFERS, lambda link: link.transfers),
    (TRANSFER_BYTES, lambda link: link.transfer_bytes),
    (STREAMED_BYTES, lambda link: link.streamed_bytes),
    (WIRE_BYTES, lambda link: link.wire_bytes),
    (TRANSFER_SECONDS, lambda link: link.transfer_s),
    (TRANSFER_FAILURES, lambda link: link.failures),
)


class FleetCollector(Collector):  # type: ignore[misc]
    """Reads the live state at each scrape. Only the labels of instances are kept between scrapes."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._instance_labels = InstanceLabels()

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(RUNNING.name, RUNNING.help, value=self._dispatcher.running_requests)
        yield GaugeMetricFamily(QUEUED.name, QUEUED.help, value=self._dispatcher.queued_requests)
        yield GaugeMetricFamily(HELD.name, HELD.help, value=self._dispatcher.machine.num_held)
        yield GaugeMetricFamily(WAIT.name, WAIT.help, value=self._dispatcher.expected_wait_s)
        yield GaugeMetricFamily(ROUTER_PYTHON_BLOCKS.name, ROUTER_PYTHON_BLOCKS.help, value=sys.getallocatedblocks())
        errors = GaugeMetricFamily(PREDICTION_ERROR.name, PREDICTION_ERROR.help, labels=PREDICTION_ERROR.labels)
        for name, residuals in self._dispatcher.machine.prediction_errors().items():
            for share in ERROR_QUANTILES if residuals.count else ():
                errors.add_metric([name, f"{share:g}"], residuals.quantile(share))
        yield errors
        instances = self._dispatcher.fleet.instances
        names = self._instance_labels.assign(instance.instance_id for instance in instances)
        yield from _instances([([names[each.instance_id], each.role.value], each) for each in instances])


def _instances(labelled: list[tuple[list[str], KnownInstance]]) -> Iterator[Metric]:
    for what, value_of in _INSTANCE_GAUGES:
        gauge = GaugeMetricFamily(what.name, what.help, labels=what.labels)
        for labels, instance in labelled:
            gauge.add_metric(labels, value_of(instance))
        yield gauge
    certificates = GaugeMetricFamily(CERTIFICATE.name, CERTIFICATE.help, labels=CERTIFICATE.labels)
    for labels, instance in labelled:
        if (not_after_s := instance.status.certificate_not_after_s) is not None:
            certificates.add_metric(labels, not_after_s)
    yield certificates
    for what, total_of in _INSTANCE_COUNTERS:
        counter = CounterMetricFamily(what.name, what.help, labels=what.labels)
        for labels, instance in labelled:
            counter.add_metric(labels, total_of(instance.status))
        yield counter
    blocks = GaugeMetricFamily(BLOCKS.name, BLOCKS.help, labels=BLOCKS.labels)
    for labels, instance in labelled:
        for owner in BLOCK_OWNERS:
            blocks.add_metric([*labels, owner], getattr(instance.status.blocks, owner))
    yield blocks
    for what, amount_of in _TRANSFER_COUNTERS:
        counter = CounterMetricFamily(what.name, what.help, labels=what.labels)
        for labels, instance in labelled:
            for transport, total in _by_transport(instance.status.links, amount_of).items():
                counter.add_metric([*labels, transport], total)
        yield counter


def _by_transport(links: tuple[LinkStats, ...], amount_of: Callable[[LinkStats], float]) -> dict[str, float]:
    """Sums over the links of one instance. Each transfer is counted by the instance that receives it."""
    totals: dict[str, float] = {}
    for link in links:
        transport = link.transport if link.transport in TRANSPORTS else OTHER_TRANSPORT
        totals[transport] = totals.get(transport, 0.0) + amount_of(link)
    return totals
