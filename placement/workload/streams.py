"""From the workload section of an SLO file to a stream of requests.

Arrivals, lengths, classes and prefixes have random generators of their own, spawned from one seed. A change of one
section leaves the others unchanged, and another rate scales the same arrivals: plans are compared on common random
numbers. A larger `count` continues the same stream.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tandem.core.errors import ConfigError
from tandem.core.slo import SloClass
from tandem.core.slo_file import ArrivalSection, PrefixSection, WorkloadSection
from tandem.placement.workload.lengths import LengthSampler, dataset, independent_sampler, lengths_of
from tandem.placement.workload.requests import Floats, Ints, RequestStream
from tandem.placement.workload.traces import read_trace

logger = logging.getLogger(__name__)

_MAX_DRAWS_PER_REQUEST = 1000


def make_stream(
    section: WorkloadSection, classes: Sequence[SloClass], *, count: int, rate: float, seed: int
) -> RequestStream:
    """`count` requests at `rate` requests per second, the first at 0. A trace may have fewer than `count` requests.

    For generated arrivals `rate` is the mean of the process; the rate of `count` arrivals differs from it by about
    1 / sqrt(count), and `scaled_to` sets it exactly. A trace is scaled to `rate` exactly and keeps the SLO classes of
    its column slo_class; otherwise classes are drawn by their shares. Logs how many requests of a trace are left out.
    Raises ConfigError.
    """
    assert count >= 1
    assert 0 < rate < math.inf
    arrival_rng, length_rng, class_rng, prefix_rng = _generators(seed)
    if section.trace is not None:
        trace = trace_requests(section, classes, seed=seed)
        for note in trace.notes:
            logger.warning("%s: %s", section.trace, note)
        return trace.requests.head(count).scaled_to(rate)
    pairs = _draw_pairs(section, count, length_rng)
    stream = RequestStream.make(
        _draw_arrivals(section.arrivals, count, arrival_rng) / rate,
        pairs[:, 0],
        pairs[:, 1],
        slo_class=_draw_classes(classes, count, class_rng),
    )
    return stream if section.prefix is None else _with_prefixes(stream, section.prefix, prefix_rng)


@dataclass(frozen=True, slots=True)
class TraceRequests:
    """The requests of a trace that are served, the first at 0. `notes` are sentences about the others."""

    requests: RequestStream
    notes: tuple[str, ...]


def trace_requests(
    section: WorkloadSection, classes: Sequence[SloClass], *, seed: int, max_context_tokens: int | None = None
) -> TraceRequests:
    """All requests of the trace of `section`, at its own rate. SLO classes are those of its column slo_class, or drawn.
    Requests that exceed `max_context_tokens`, prompt and output together, are left out: the server refuses them.
    Raises ConfigError."""
    assert section.trace is not None
    trace = read_trace(section.trace, classes)
    notes = []
    if trace.num_without_output:
        notes.append(
            f"{trace.num_without_output:,} of {trace.num_rows:,} requests have no output tokens and are left out"
        )
    if trace.num_late:
        notes.append(f"{trace.num_late:,} of {trace.num_rows:,} rows are not in order of arrival; they were sorted")
    stream = _scaled_lengths(trace.requests, section)
    limits = (
        (section.max_total_tokens, "workload.max_total_tokens", "they are left out", "raise it"),
        (max_context_tokens, "the context of the model,", "the server refuses them", "lower workload.length_scale"),
    )
    for limit, name, outcome, advice in limits:
        if limit is None:
            continue
        fits = stream.prompt_tokens + stream.output_tokens <= limit
        if not fits.any():
            raise ConfigError(f"{section.trace}: all requests exceed {name} {limit}; {advice}")
        if not fits.all():
            notes.append(f"{int((~fits).sum()):,} of {trace.num_rows:,} requests exceed {name} {limit:,}; {outcome}")
            stream = stream.select(fits)
    _, _, class_rng, prefix_rng = _generators(seed)
    stream = replace(stream, arrival_s=stream.arrival_s - stream.arrival_s[0])
    if not trace.has_classes:
        stream = replace(stream, slo_class=_draw_classes(classes, len(stream), class_rng))
    if section.prefix is not None:
        stream = _with_prefixes(stream, section.prefix, prefix_rng)
    return TraceRequests(stream, tuple(notes))


def _generators(seed: int) -> list[np.random.Generator]:
    """For arrivals, lengths, classes and prefixes."""
    return [np.random.Generator(np.random.PCG64(child)) for child in np.random.SeedSequence(seed).spawn(4)]


def _scaled_lengths(stream: RequestStream, section: WorkloadSection) -> RequestStream:
    if section.length_scale == 1.0:
        return stream
    return replace(
        stream,
        prompt_tokens=_scaled(stream.prompt_tokens, section.length_scale, least=1),
        output_tokens=_scaled(stream.output_tokens, section.length_scale, least=1),
        prefix_tokens=_scaled(stream.prefix_tokens, section.length_scale, least=0),
    )


def _draw_pairs(section: WorkloadSection, count: int, rng: np.random.Generator) -> Ints:
    """[count, 2]. Each row is accepted or rejected on its own, so a larger `count` continues the same rows."""
    sampler, dataset_limit = _length_sampler(section)
    kept: list[Ints] = []
    missing, drawn = count, 0
    while missing > 0:
        pairs = sampler(rng.random((max(missing, 256), 2)))
        drawn += len(pairs)
        if dataset_limit is not None:
            pairs = pairs[pairs.sum(axis=1) <= dataset_limit]
        pairs = _scaled(pairs, section.length_scale, least=1)
        if section.max_total_tokens is not None:
            pairs = pairs[pairs.sum(axis=1) <= section.max_total_tokens]
        kept.append(pairs[:missing])
        missing -= len(kept[-1])
        if drawn > _MAX_DRAWS_PER_REQUEST * (count - missing + 256):
            raise ConfigError(
                f"workload.max_total_tokens {section.max_total_tokens} rejects almost all requests; raise it or lower "
                "workload.length_scale"
            )
    return np.concatenate(kept)


def _length_sampler(section: WorkloadSection) -> tuple[LengthSampler, int | None]:
    """The sampler and the data set's own limit on prompt and output tokens."""
    if section.dataset is not None:
        lengths = dataset(section.dataset)
        return lengths.sampler(), lengths.max_total_tokens
    assert section.prompt_tokens is not None
    assert section.output_tokens is not None
    return independent_sampler(lengths_of(section.prompt_tokens), lengths_of(section.output_tokens)), None


def _draw_arrivals(section: ArrivalSection, count: int, rng: np.random.Generator) -> Floats:
    """At a mean rate of one request per second, the first at 0."""
    if section.process == "poisson":
        gaps = rng.standard_exponential(count)
    else:
        shape = 1.0 / (section.cv * section.cv)
        gaps = rng.standard_gamma(shape, count) / shape
    arrival_s: Floats = np.cumsum(gaps) - gaps[0]
    return arrival_s


def _draw_classes(classes: Sequence[SloClass], count: int, rng: np.random.Generator) -> Ints:
    ends = np.cumsum([slo.share for slo in classes])
    drawn: Ints = np.searchsorted(ends, rng.random(count) * ends[-1], side="right").astype(np.int64)
    return drawn


def _with_prefixes(stream: RequestStream, section: PrefixSection, rng: np.random.Generator) -> RequestStream:
    uniform = rng.random((len(stream), 2))
    shares = uniform[:, 0] < section.share
    group = (uniform[:, 1] * section.groups).astype(np.int64)
    return replace(
        stream,
        prefix_group=np.where(shares, group, -1),
        prefix_tokens=np.where(shares, np.minimum(section.tokens, stream.prompt_tokens), 0),
    )


def _scaled(tokens: Ints, factor: float, least: int) -> Ints:
    if factor == 1.0:
        return tokens
    scaled: Ints = np.maximum(least, np.rint(tokens * factor)).astype(np.int64)
    return scaled
