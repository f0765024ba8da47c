"""Prometheus metrics of SLO classes: how many requests met their targets, and the latencies behind it.

The label `slo_class` is a class of the router's file, `custom` for requests with targets of their own, or `none`: a
client cannot create a time series. For a class, `rate(tandem_slo_met_total)` is its goodput, and its attainment is that
divided by `rate(tandem_slo_requests_total)`.
"""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem.core.errors import TandemError
from tandem.core.request_slo import CUSTOM_CLASS, NO_CLASS
from tandem.core.slo import SloClass
from tandem.router.metric_descriptions import SECONDS, Description
from tandem.router.records import RequestRecord
from tandem.router.token_gaps import BUCKETS_S, TokenGaps

_CLASS = ("slo_class",)
REQUESTS = Description("tandem_slo_requests_total", "Requests with targets that have ended, refused ones too", _CLASS)
MET = Description("tandem_slo_met_total", "Those that met all their targets; the rate of it is goodput", _CLASS)
VIOLATIONS = Description(
    "tandem_slo_violations_total", "Targets missed; a failed request has missed all it had", (*_CLASS, "target")
)
DEMOTED = Description("tandem_slo_demoted_total", "Those that became best effort, since they would be late", _CLASS)
REFUSED = Description("tandem_slo_refused_total", "Those that were refused for want of room", _CLASS)
TTFT_ERROR = Description(
    "tandem_ttft_prediction_error_seconds", "Difference of predicted and actual time to first token", _CLASS
)
TTFT = Description("tandem_slo_ttft_seconds", "Time to first token of requests with targets", _CLASS)
TPOT = Description("tandem_slo_tpot_seconds", "Time per output token after the first, of the same", _CLASS)
GAPS = Description("tandem_token_gap_seconds", "Time between two deliveries of a request's tokens", _CLASS)
TARGETS = Description("tandem_slo_target_seconds", "Targets of the classes", (*_CLASS, "target"))
ATTAINMENT = Description("tandem_slo_attainment_target", "Share of requests that must meet their targets", _CLASS)

_TARGETS = ("ttft", "tpot")


class SloMetrics(Collector):  # type: ignore[misc]
    """Counts requests when they end. A `RequestObserver`."""

    def __init__(self, classes: Sequence[SloClass], registry: CollectorRegistry) -> None:
        self._classes = tuple(classes)
        names = (*(slo.name for slo in classes), CUSTOM_CLASS)
        requests, met, demoted, refused = (
            Counter(what.name, what.help, what.labels, registry=registry) for what in (REQUESTS, MET, DEMOTED, REFUSED)
        )
        violations = Counter(VIOLATIONS.name, VIOLATIONS.help, VIOLATIONS.labels, registry=registry)
        ttft, tpot, errors = (
            Histogram(what.name, what.help, what.labels, buckets=SECONDS, registry=registry)
            for what in (TTFT, TPOT, TTFT_ERROR)
        )
        self._requests = {name: requests.labels(slo_class=name) for name in names}
        self._met = {name: met.labels(slo_class=name) for name in names}
        self._demoted = {name: demoted.labels(slo_class=name) for name in names}
        self._refused = {name: refused.labels(slo_class=name) for name in names}
        self._violations = {
            (name, target): violations.labels(slo_class=name, target=target) for name in names for target in _TARGETS
        }
        self._ttft = {name: ttft.labels(slo_class=name) for name in names}
        self._tpot = {name: tpot.labels(slo_class=name) for name in names}
        self._errors = {name: errors.labels(slo_class=name) for name in names}
        self._gaps = {name: TokenGaps() for name in (*names, NO_CLASS)}
        registry.register(self)

    def finished(self, record: RequestRecord) -> None:
        slo, timeline = record.slo, record.timeline
        self._gaps[slo.name].merge(record.token_gaps)
        missed = record.missed_targets
        if missed is None:
            return
        self._count(record, missed)
        if timeline.ttft_s is not None:
            self._ttft[slo.name].observe(timeline.ttft_s)
            if record.predicted_ttft_s is not None:
                self._errors[slo.name].observe(abs(timeline.ttft_s - record.predicted_ttft_s))
        if timeline.tpot_s is not None:
            self._tpot[slo.name].observe(timeline.tpot_s)

    def refused(self, error: TandemError, record: RequestRecord | None = None) -> None:
        """A request that could not be served has missed its targets; one that is wrong does not count."""
        if record is not None and record.missed_targets is not None:
            self._count(record, record.missed_targets)

    def _count(self, record: RequestRecord, missed: tuple[str, ...]) -> None:
        name = record.slo.name
        self._requests[name].inc()
        if record.demoted_because is not None:
            self._demoted[name].inc()
        if record.refused_because is not None:
            self._refused[name].inc()
        if not missed:
            self._met[name].inc()
        for target in missed:
            self._violations[name, target].inc()

    def collect(self) -> Iterator[Metric]:
        gaps = HistogramMetricFamily(GAPS.name, GAPS.help, labels=GAPS.labels)
        bounds = [*map(str, BUCKETS_S), "+Inf"]
        for name, of_class in self._gaps.items():
            counts = zip(bounds, of_class.cumulative_counts(), strict=True)
            gaps.add_metric([name], buckets=list(counts), sum_value=of_class.sum_s)
        yield gaps
        targets = GaugeMetricFamily(TARGETS.name, TARGETS.help, labels=TARGETS.labels)
        attainment = GaugeMetricFamily(ATTAINMENT.name, ATTAINMENT.help, labels=ATTAINMENT.labels)
        for slo in self._classes:
            targets.add_metric([slo.name, "ttft"], slo.ttft_s)
            targets.add_metric([slo.name, "tpot"], slo.tpot_s)
            attainment.add_metric([slo.name], slo.attainment)
        yield targets
        yield attainment
