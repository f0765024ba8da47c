"""Prometheus metrics of a router: its requests, and the reports of its workers.

The value of a label comes from a fixed list, or is the name of a registered instance (`router/instance_labels.py`): a
client cannot create a time series, nor can a restart or another pair of instances.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from tandem.core import errors
from tandem.core.errors import TandemError
from tandem.core.replanning import DriftState, ReplanStatus
from tandem.core.slo import SloClass
from tandem.core.timeline import PARTS
from tandem.router.dispatch import Dispatcher
from tandem.router.fleet_metrics import FleetCollector
from tandem.router.metric_descriptions import SECONDS, Description
from tandem.router.records import COMPLETE, RequestRecord
from tandem.router.slo_metrics import SloMetrics
from tandem.router.vllm_metrics import VllmMetrics
from tandem.wire.server_tls import ServerTls

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
            errors.PermissionDeniedError,
            errors.DuplicateRequestError,
            errors.OverloadedError,
            errors.UnavailableError,
            errors.DeadlineError,
            errors.InternalError,
        )
    ),
)


# The names of counters end in _total. Metrics of the fleet and of SLO classes are in files of their own.
TTFT = Description("tandem_ttft_seconds", "Time from the request's arrival to its first token")
TPOT = Description("tandem_tpot_seconds", "Time per output token after the first, of complete requests")
PART = Description("tandem_request_part_seconds", "Parts of complete requests' time, which sum to it", ("part",))
REQUESTS = Description("tandem_requests_total", "Requests that have ended, by outcome", ("outcome",))
ATTEMPTS = Description("tandem_attempts_total", "Attempts of finished requests at a pair of workers")
RETRIES = Description("tandem_retries_total", "Attempts after the first, of finished requests")
PROMPT_TOKENS = Description("tandem_prompt_tokens_total", "Prompt tokens of finished requests")
CACHED_TOKENS = Description("tandem_cached_prompt_tokens_total", "Prompt tokens found in a prefix cache")
OUTPUT_TOKENS = Description("tandem_output_tokens_total", "Output tokens of finished requests")

# Only for a router with TLS.
CERTIFICATE = Description(
    "tandem_certificate_not_after_timestamp_seconds",
    "When a certificate of this router expires, in seconds since 1970",
    ("certificate",),
)

# Only for a cluster whose plan is watched.
DRIFT = Description("tandem_workload_drift", "How far the workload is from the plan's; the plan may be wrong from 1 on")
REPLAN_STATE = Description("tandem_replan_state", "1 for the current state of the plan watch", ("state",))
REPLAN_GAIN = Description("tandem_replan_proposed_gain", "Relative gain of the proposed plan, 0 without one")


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


class _CertificateCollector(Collector):  # type: ignore[misc]
    def __init__(self, certificates: Mapping[str, ServerTls]) -> None:
        self._certificates = certificates

    def collect(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily(CERTIFICATE.name, CERTIFICATE.help, labels=CERTIFICATE.labels)
        for setting, tls in self._certificates.items():
            if tls.not_after_s is not None:
                gauge.add_metric([setting], tls.not_after_s)
        yield gauge


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
        self.registry.register(FleetCollector(dispatcher))

    def add_vllm_names(self, dispatcher: Dispatcher, model: str) -> None:
        """Add the metrics that other gateways read. `model` is its name in the API."""
        self.registry.register(VllmMetrics(dispatcher, model))

    def watch_certificates(self, certificates: Mapping[str, ServerTls]) -> None:
        """Add the metrics of the router's certificates, by the setting that names their files."""
        self.registry.register(_CertificateCollector(certificates))

    def watch_replanning(self, source: Callable[[], ReplanStatus | None]) -> None:
        """Add the metrics of the plan watch; they appear with its first report."""
        self.registry.register(_ReplanCollector(source))

    def render(self) -> bytes:
        return bytes(generate_latest(self.registry))
