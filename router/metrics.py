"""Prometheus metrics of a router: its requests, and the reports of its workers.

The value of a label comes from a fixed list, or is the id of a registered instance: a client cannot create a time
series, and the time series of an instance end with it.
"""

import sys
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from tandem.core import errors
from tandem.core.errors import TandemError
from tandem.core.replanning import DriftState, ReplanStatus
from tandem.core.session import InstanceStatus
from tandem.core.slo import SloClass
from tandem.core.timeline import PARTS
from tandem.router.dispatch import Dispatcher
from tandem.router.metric_descriptions import SECONDS, Description
from tandem.router.records import COMPLETE, RequestRecord
from tandem.router.slo_metrics import SloMetrics
from tandem.scheduling.known_instance import KnownInstance

OUTCOMES = (
    *COMPLETE,
    *(
        error.code
        for error in (
            errors.CancelledError,
            errors.InvalidRequestError,
            errors.ContextLengthError,
            errors.ModelNotFoundError,
            errors.PayloadTooLargeError,
            errors.UnsupportedMediaTypeError,
            errors.UnauthenticatedError,
            errors.DuplicateRequestError,
            errors.OverloadedError,
            errors.UnavailableError,
            errors.DeadlineError,
            errors.InternalError,
        )
    ),
)


# All metrics. The names of counters end in _total.
TTFT = Description("tandem_ttft_seconds", "Time from the request's arrival to its first token")
TPOT = Description("tandem_tpot_seconds", "Time per output token after the first, of complete requests")
PART = Description("tandem_request_part_seconds", "Parts of complete requests' time, which sum to it", ("part",))
REQUESTS = Description("tandem_requests_total", "Requests that have ended, by outcome", ("outcome",))
ATTEMPTS = Description("tandem_attempts_total", "Attempts of finished requests at a pair of workers")
RETRIES = Description("tandem_retries_total", "Attempts after the first, of finished requests")
PROMPT_TOKENS = Description("tandem_prompt_tokens_total", "Prompt tokens of finished requests")
CACHED_TOKENS = Description("tandem_cached_prompt_tokens_total", "Prompt tokens found in a prefix cache")
OUTPUT_TOKENS = Description("tandem_output_tokens_total", "Output tokens of finished requests")
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
_ERROR_QUANTILES = (0.1, 0.5, 0.8, 0.9)

_BY_INSTANCE = ("tandem_instance", "role")  # `instance` is the name that Prometheus gives to what it scrapes
_BY_LINK = ("tandem_instance", "peer", "transport")
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
TRANSFERS = Description("tandem_transfers_total", "KV transfers over a link", _BY_LINK)
TRANSFER_BYTES = Description("tandem_transfer_bytes_total", "Bytes of KV transfers", _BY_LINK)
TRANSFER_SECONDS = Description("tandem_transfer_seconds_total", "Time of KV transfers", _BY_LINK)
TRANSFER_FAILURES = Description("tandem_transfer_failures_total", "KV transfers that failed", _BY_LINK)

# Only for a cluster whose plan is watched.
DRIFT = Description("tandem_workload_drift", "How far the workload is from the plan's; the plan may be wrong from 1 on")
REPLAN_STATE = Description("tandem_replan_state", "1 for the current state of the plan watch", ("state",))
REPLAN_GAIN = Description("tandem_replan_proposed_gain", "Relative gain of the proposed plan, 0 without one")

BLOCK_OWNERS = ("total", "free", "running", "cached", "leased", "leaked")

_INSTANCE_GAUGES: tuple[tuple[Description, Callable[[KnownInstance], float]], ...] = (
    (UP, lambda instance: float(instance.is_usable)),
    (OPEN, lambda instance: instance.open_requests),
    (WAITING, lambda instance: instance.status.waiting_requests),
    (WAITING_TOKENS, lambda instance: instance.status.uncomputed_tokens + instance.status.unreserved_tokens),
    (COMPUTING, lambda instance: instance.status.running_requests),
    (STEP_AGE, lambda instance: instance.status.step_age_s),
    (PYTHON_BLOCKS, lambda instance: instance.status.allocated_blocks),
)
_INSTANCE_COUNTERS: tuple[tuple[Description, Callable[[InstanceStatus], float]], ...] = (
    (STEPS, lambda status: status.steps),
    (STEP_SECONDS, lambda status: status.step_s),
    (COMPUTED, lambda status: status.computed_tokens),
    (CACHE_HITS, lambda status: status.cached_tokens),
    (PREEMPTIONS, lambda status: status.preemptions),
)


class RequestMetrics:
    """Counts requests when they end. A `RequestObserver`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ttft = _histogram(TTFT, registry)
        self._tpot = _histogram(TPOT, registry)
        part = _histogram(PART, registry)
        self._parts = {name: part.labels(part=name) for _, name in PARTS}
        requests = _counter(REQUESTS, registry)
        self._requests = {outcome: requests.labels(outcome=outcome) for outcome in OUTCOMES}
        self._attempts = _counter(ATTEMPTS, registry)
        self._retries = _counter(RETRIES, registry)
        self._prompt_tokens = _counter(PROMPT_TOKENS, registry)
        self._cached_tokens = _counter(CACHED_TOKENS, registry)
        self._output_tokens = _counter(OUTPUT_TOKENS, registry)

    def finished(self, record: RequestRecord) -> None:
        timeline = record.timeline
        self._count_outcome(record.outcome)
        if timeline.ttft_s is not None:
            self._ttft.observe(timeline.ttft_s)
        if record.outcome in COMPLETE:  # a failed request may end within any part
            if timeline.tpot_s is not None:
                self._tpot.observe(timeline.tpot_s)
            for name, part_s in timeline.parts().items():
                self._parts[name].observe(part_s)
        self._attempts.inc(len(record.attempts))
        self._retries.inc(max(0, len(record.attempts) - 1))  # one that waited in vain had none
        self._prompt_tokens.inc(timeline.num_prompt_tokens)
        self._cached_tokens.inc(timeline.num_cached_tokens)
        self._output_tokens.inc(timeline.num_output_tokens)

    def refused(self, error: TandemError, record: RequestRecord | None = None) -> None:
        """Count a request that the dispatcher or the text side refused."""
        self._count_outcome(error.code)

    def _count_outcome(self, outcome: str) -> None:
        self._requests.get(outcome, self._requests["internal"]).inc()


class _FleetCollector(Collector):  # type: ignore[misc]
    """Reads the live state at each scrape, so that nothing is stored per instance."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(RUNNING.name, RUNNING.help, value=self._dispatcher.running_requests)
        yield GaugeMetricFamily(QUEUED.name, QUEUED.help, value=self._dispatcher.queued_requests)
        yield GaugeMetricFamily(HELD.name, HELD.help, value=self._dispatcher.machine.num_held)
        yield GaugeMetricFamily(WAIT.name, WAIT.help, value=self._dispatcher.expected_wait_s)
        yield GaugeMetricFamily(ROUTER_PYTHON_BLOCKS.name, ROUTER_PYTHON_BLOCKS.help, value=sys.getallocatedblocks())
        errors = GaugeMetricFamily(PREDICTION_ERROR.name, PREDICTION_ERROR.help, labels=PREDICTION_ERROR.labels)
        for name, residuals in self._dispatcher.machine.prediction_errors().items():
            for share in _ERROR_QUANTILES if residuals.count else ():
                errors.add_metric([name, f"{share:g}"], residuals.quantile(share))
        yield errors
        instances = self._dispatcher.fleet.instances
        for what, value_of in _INSTANCE_GAUGES:
            gauge = GaugeMetricFamily(what.name, what.help, labels=what.labels)
            for instance in instances:
                gauge.add_metric(_labels(instance), value_of(instance))
            yield gauge
        for what, total_of in _INSTANCE_COUNTERS:
            counter = CounterMetricFamily(what.name, what.help, labels=what.labels)
            for instance in instances:
                counter.add_metric(_labels(instance), total_of(instance.status))
            yield counter
        blocks = GaugeMetricFamily(BLOCKS.name, BLOCKS.help, labels=BLOCKS.labels)
        for instance in instances:
            for owner in BLOCK_OWNERS:
                blocks.add_metric([*_labels(instance), owner], getattr(instance.status.blocks, owner))
        yield blocks
        yield from _links(instances)


class _ReplanCollector(Collector):  # type: ignore[misc]
    def __init__(self, source: Callable[[], ReplanStatus | None]) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        status = self._source()
        if status is None:
            return
        yield GaugeMetricFamily(DRIFT.name, DRIFT.help, value=status.drift)
        states = GaugeMetricFamily(REPLAN_STATE.name, REPLAN_STATE.help, labels=REPLAN_STATE.labels)
        for state in DriftState:
            states.add_metric([state.value], float(state is status.state))
        yield states
        gain = 0.0 if status.proposal is None else status.proposal.gain
        yield GaugeMetricFamily(REPLAN_GAIN.name, REPLAN_GAIN.help, value=gain)


def _links(instances: tuple[KnownInstance, ...]) -> Iterator[Metric]:
    """Each link as reported by its receiving instance."""
    families = [
        CounterMetricFamily(what.name, what.help, labels=what.labels)
        for what in (TRANSFERS, TRANSFER_BYTES, TRANSFER_SECONDS, TRANSFER_FAILURES)
    ]
    for instance in instances:
        for link in instance.status.links:
            labels = [instance.instance_id, link.peer_id, link.transport]
            totals = (link.transfers, link.transfer_bytes, link.transfer_s, link.failures)
            for family, total in zip(families, totals, strict=True):
                family.add_metric(labels, total)
    yield from families


def _labels(instance: KnownInstance) -> list[str]:
    return [instance.instance_id, instance.role.value]


def _histogram(what: Description, registry: CollectorRegistry) -> Histogram:
    return Histogram(what.name, what.help, what.labels, buckets=SECONDS, registry=registry)


def _counter(what: Description, registry: CollectorRegistry) -> Counter:
    return Counter(what.name, what.help, what.labels, registry=registry)


class Metrics:
    """The router's metrics registry. `render` gives the page `/metrics`, in text format 0.0.4."""

    def __init__(self, classes: Sequence[SloClass] = ()) -> None:
        """`classes` are those that requests may name."""
        self.registry = CollectorRegistry(auto_describe=False)
        self.requests = RequestMetrics(self.registry)
        self.slo = SloMetrics(classes, self.registry)

    def watch(self, dispatcher: Dispatcher) -> None:
        """Add the metrics of the live state. Call it once."""
        self.registry.register(_FleetCollector(dispatcher))

    def watch_replanning(self, source: Callable[[], ReplanStatus | None]) -> None:
        """Add the metrics of the plan watch; they appear with its first report."""
        self.registry.register(_ReplanCollector(source))

    def render(self) -> bytes:
        return bytes(generate_latest(self.registry))
