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
from scipy.optimize import brentq
from scipy.special import gamma, gammaln

from tandem.core.errors import ConfigError
from tandem.core.slo import SloClass
from tandem.core.slo_file import ArrivalSection, PopulationSection, PrefixSection, WorkloadSection
from tandem.placement.workload.datasets import dataset
from tandem.placement.workload.length_tables import read_pairs
from tandem.placement.workload.lengths import LengthSampler, independent_sampler, lengths_of
from tandem.placement.workload.requests import Floats, Ints, RequestStream, merged
from tandem.placement.workload.traces import read_trace

logger = logging.getLogger(__name__)

_MAX_DRAWS_PER_REQUEST = 1000


@dataclass(frozen=True, slots=True)
class ServedRequests:
    """The requests of a workload that are served, the first at 0. `notes` are sentences about the others."""

    requests: RequestStream
    notes: tuple[str, ...]


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
    if section.trace is not None:
        trace = trace_requests(section, classes, seed=seed)
        for note in trace.notes:
            logger.warning("%s: %s", section.trace, note)
        return trace.requests.head(count).scaled_to(rate)
    return generated_requests(section, classes, count=count, rate=rate, seed=seed).requests


def generated_requests(
    section: WorkloadSection,
    classes: Sequence[SloClass],
    *,
    count: int,
    rate: float,
    seed: int,
    max_context_tokens: int | None = None,
) -> ServedRequests:
    """As `make_stream` without a trace, and others in the place of requests that exceed `max_context_tokens`, prompt
    and output together: the server refuses those."""
    limits = _Limits(section.length_scale, section.max_total_tokens, max_context_tokens)
    seeds = np.random.SeedSequence(seed)
    generators = _generators(seeds)
    if section.populations:
        drawn = _draw_populations(section.populations, classes, count, limits, seeds.spawn(len(section.populations)))
    else:
        drawn = _draw_population(section, classes, count, limits, generators)
    stream = replace(drawn.requests, arrival_s=(drawn.requests.arrival_s - drawn.requests.arrival_s[0]) / rate)
    if not drawn.num_beyond:
        return ServedRequests(stream, ())
    share = drawn.num_beyond / (drawn.num_beyond + count)
    note = f"{share:.1%} of requests exceed the context of the model, {max_context_tokens:,} tokens"
    return ServedRequests(stream, (f"{note}; the server refuses them",))


def trace_requests(
    section: WorkloadSection, classes: Sequence[SloClass], *, seed: int, max_context_tokens: int | None = None
) -> ServedRequests:
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
    _, _, class_rng, prefix_rng = _generators(np.random.SeedSequence(seed))
    stream = replace(stream, arrival_s=stream.arrival_s - stream.arrival_s[0])
    if not trace.has_classes:
        stream = replace(stream, slo_class=_draw_classes(classes, len(stream), class_rng))
    if section.prefix is not None:
        stream = _with_prefixes(stream, section.prefix, prefix_rng)
    return ServedRequests(stream, tuple(notes))


def _generators(seed: np.random.SeedSequence) -> list[np.random.Generator]:
    """For arrivals, lengths, classes and prefixes."""
    return [np.random.Generator(np.random.PCG64(child)) for child in seed.spawn(4)]


def _scaled_lengths(stream: RequestStream, section: WorkloadSection) -> RequestStream:
    if section.length_scale == 1.0:
        return stream
    return replace(
        stream,
        prompt_tokens=_scaled(stream.prompt_tokens, section.length_scale, least=1),
        output_tokens=_scaled(stream.output_tokens, section.length_scale, least=1),
        prefix_tokens=_scaled(stream.prefix_tokens, section.length_scale, least=0),
    )


@dataclass(frozen=True, slots=True)
class _Limits:
    """What becomes of drawn lengths: they are multiplied, and those beyond a limit are drawn again."""

    length_scale: float
    max_total_tokens: int | None
    max_context_tokens: int | None

    def rejection(self) -> str:
        """The sentence for a limit that rejects almost everything."""
        total, context = self.max_total_tokens, self.max_context_tokens
        if total is not None and (context is None or total <= context):
            limit = f"workload.max_total_tokens {total}"
            return f"{limit} rejects almost all requests; raise it or lower workload.length_scale"
        return f"almost all requests exceed the context of the model, {context} tokens; lower workload.length_scale"


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Requests at a mean rate of one per second, and the number of others, beyond the context."""

    requests: RequestStream
    num_beyond: int


def _draw_population(
    section: WorkloadSection | PopulationSection,
    classes: Sequence[SloClass],
    count: int,
    limits: _Limits,
    generators: Sequence[np.random.Generator],
) -> _Drawn:
    arrival_rng, *others = generators
    return _draw_requests(section, classes, _draw_arrivals(section.arrivals, count, arrival_rng), limits, others)


def _draw_populations(
    populations: Sequence[PopulationSection],
    classes: Sequence[SloClass],
    count: int,
    limits: _Limits,
    seeds: Sequence[np.random.SeedSequence],
) -> _Drawn:
    """The first `count` requests of all populations together. Each has generators of its own; among the first `count`
    requests of all there are at most `count` of one."""
    total = sum(population.share for population in populations)
    generators = [_generators(seed) for seed in seeds]
    arrivals = [
        _draw_arrivals(population.arrivals, count, rng[0]) * (total / population.share)
        for population, rng in zip(populations, generators, strict=True)
    ]
    last_s = np.partition(np.concatenate(arrivals), count - 1)[count - 1]
    parts, num_beyond, num_groups = [], 0, 0
    for population, arrival_s, (_, *others) in zip(populations, arrivals, generators, strict=True):
        arrival_s = arrival_s[arrival_s <= last_s]
        if not len(arrival_s):
            continue
        drawn = _draw_requests(population, classes, arrival_s, limits, others)
        group = np.where(drawn.requests.prefix_group < 0, -1, drawn.requests.prefix_group + num_groups)
        parts.append(replace(drawn.requests, prefix_group=group))
        num_beyond += drawn.num_beyond
        num_groups += population.prefix.groups if population.prefix is not None else 0
    return _Drawn(merged(parts).head(count), num_beyond)


def _draw_requests(
    section: WorkloadSection | PopulationSection,
    classes: Sequence[SloClass],
    arrival_s: Floats,
    limits: _Limits,
    generators: Sequence[np.random.Generator],
) -> _Drawn:
    """`generators`: for lengths, classes and prefixes."""
    length_rng, class_rng, prefix_rng = generators
    pairs, num_beyond = _draw_pairs(section, limits, len(arrival_s), length_rng)
    names = [slo.name for slo in classes]
    if isinstance(section, PopulationSection) and section.slo_class is not None:
        slo_class = np.full(len(arrival_s), names.index(section.slo_class), dtype=np.int64)
    else:
        slo_class = _draw_classes(classes, len(arrival_s), class_rng)
    stream = RequestStream.make(arrival_s, pairs[:, 0], pairs[:, 1], slo_class=slo_class)
    if section.prefix is not None:
        stream = _with_prefixes(stream, section.prefix, prefix_rng)
    return _Drawn(stream, num_beyond)


def _draw_pairs(
    section: WorkloadSection | PopulationSection, limits: _Limits, count: int, rng: np.random.Generator
) -> tuple[Ints, int]:
    """[count, 2], and how many others were beyond the context. Each row is accepted or rejected on its own, so a larger
    `count` continues the same rows."""
    sampler, dataset_limit = _length_sampler(section)
    kept: list[Ints] = []
    missing, drawn, num_beyond = count, 0, 0
    while missing > 0:
        pairs = sampler(rng.random((max(missing, 256), 2)))
        drawn += len(pairs)
        if dataset_limit is not None:
            pairs = pairs[pairs.sum(axis=1) <= dataset_limit]
        pairs = _scaled(pairs, limits.length_scale, least=1)
        if limits.max_total_tokens is not None:
            pairs = pairs[pairs.sum(axis=1) <= limits.max_total_tokens]
        if limits.max_context_tokens is not None:
            fits = pairs.sum(axis=1) <= limits.max_context_tokens
            rows = np.flatnonzero(fits)[:missing]
            num_beyond += int((~fits[: rows[-1] + 1]).sum()) if len(rows) == missing else int((~fits).sum())
            pairs = pairs[rows]
        kept.append(pairs[:missing])
        missing -= len(kept[-1])
        if drawn > _MAX_DRAWS_PER_REQUEST * (count - missing + 256):
            raise ConfigError(limits.rejection())
    return np.concatenate(kept), num_beyond


def _length_sampler(section: WorkloadSection | PopulationSection) -> tuple[LengthSampler, int | None]:
    """The sampler and the data set's own limit on prompt and output tokens."""
    if section.dataset is not None:
        lengths = dataset(section.dataset)
        return lengths.sampler(), lengths.max_total_tokens
    if section.lengths is not None:
        return read_pairs(section.lengths).sample, None
    assert section.prompt_tokens is not None
    assert section.output_tokens is not None
    return independent_sampler(lengths_of(section.prompt_tokens), lengths_of(section.output_tokens)), None


def _draw_arrivals(section: ArrivalSection, count: int, rng: np.random.Generator) -> Floats:
    """At a mean rate of one request per second, the first after one time between arrivals."""
    if section.process == "poisson":
        gaps = rng.standard_exponential(count)
    elif section.process == "gamma":
        shape = 1.0 / (section.cv * section.cv)
        gaps = rng.standard_gamma(shape, count) / shape
    else:
        shape = _weibull_shape(section.cv)
        gaps = rng.weibull(shape, count) / gamma(1 + 1 / shape)
    arrival_s: Floats = np.cumsum(gaps)
    return arrival_s


def _weibull_shape(cv: float) -> float:
    def log_square(log_shape: float) -> float:
        """log(1 + cv^2) of this shape."""
        inverse = math.exp(-log_shape)
        return float(gammaln(1 + 2 * inverse) - 2 * gammaln(1 + inverse))

    return math.exp(brentq(lambda log_shape: log_square(log_shape) - math.log1p(cv * cv), -4.0, 12.0))


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
