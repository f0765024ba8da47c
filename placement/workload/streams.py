"""From the workload section of an SLO file to a stream of requests.

Arrivals, lengths, classes and prefixes are drawn from streams of numbers of their own, spawned from one seed. To change
one of them leaves the others as they were, and another rate stretches the same arrivals: plans are compared on common
random numbers. A larger `count` continues the same stream.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tandem.core.errors import ConfigError
from tandem.core.slo import SloClass
from tandem.core.slo_file import ArrivalSection, PrefixSection, WorkloadSection
from tandem.placement.workload.lengths import DATASETS, PairsOf, dataset, lengths_of, pairs_of_distributions
from tandem.placement.workload.requests import Floats, Ints, RequestStream
from tandem.placement.workload.traces import load_trace, read_trace

__all__ = ["DATASETS", "load_trace", "make_stream"]

_MAX_DRAWS_PER_REQUEST = 1000


def make_stream(
    section: WorkloadSection, classes: Sequence[SloClass], *, count: int, rate: float, seed: int
) -> RequestStream:
    """`count` requests at `rate` per second; the first arrives at 0. A trace gives as many as it has, up to `count`.

    Of generated arrivals `rate` is the mean of the process: what `count` of them come to differs by about
    1 / sqrt(count), and `scaled_to` sets it exactly. A trace is stretched to `rate` exactly; its SLO classes, where it
    names them, are kept, else classes are drawn by their shares. Raises ConfigError.
    """
    assert count >= 1
    assert 0 < rate < math.inf
    arrivals, lengths, choice, prefixes = (
        np.random.Generator(np.random.PCG64(child)) for child in np.random.SeedSequence(seed).spawn(4)
    )
    if section.trace is not None:
        trace = read_trace(section.trace, classes)
        stream = _fitted(trace.requests, section).head(count)
        if len(stream) == 0:
            raise ConfigError(f"{section.trace}: no request has at most {section.max_total_tokens} tokens")
        stream = stream.scaled_to(rate)
        if not trace.has_classes:
            stream = replace(stream, slo_class=_draw_classes(classes, len(stream), choice))
    else:
        pairs = _draw_pairs(section, count, lengths)
        stream = RequestStream.make(
            _draw_arrivals(section.arrivals, count, arrivals) / rate,
            pairs[:, 0],
            pairs[:, 1],
            slo_class=_draw_classes(classes, count, choice),
        )
    return stream if section.prefix is None else _with_prefixes(stream, section.prefix, prefixes)


def _fitted(stream: RequestStream, section: WorkloadSection) -> RequestStream:
    """Lengths scaled, then requests that are too long left out."""
    if section.length_scale != 1.0:
        stream = replace(
            stream,
            prompt_tokens=_scaled(stream.prompt_tokens, section.length_scale, least=1),
            output_tokens=_scaled(stream.output_tokens, section.length_scale, least=1),
            prefix_tokens=_scaled(stream.prefix_tokens, section.length_scale, least=0),
        )
    if section.max_total_tokens is None:
        return stream
    return stream.select(stream.prompt_tokens + stream.output_tokens <= section.max_total_tokens)


def _draw_pairs(section: WorkloadSection, count: int, rng: np.random.Generator) -> Ints:
    """[count, 2]. Rows are kept or left out one by one, so that more requests begin with the same ones."""
    source, own_limit = _pairs_source(section)
    kept: list[Ints] = []
    missing, drawn = count, 0
    while missing > 0:
        pairs = source(rng.random((max(missing, 256), 2)))
        drawn += len(pairs)
        if own_limit is not None:
            pairs = pairs[pairs.sum(axis=1) <= own_limit]
        pairs = _scaled(pairs, section.length_scale, least=1)
        if section.max_total_tokens is not None:
            pairs = pairs[pairs.sum(axis=1) <= section.max_total_tokens]
        kept.append(pairs[:missing])
        missing -= len(kept[-1])
        if drawn > _MAX_DRAWS_PER_REQUEST * (count - missing + 256):
            raise ConfigError(
                f"workload.max_total_tokens {section.max_total_tokens} leaves almost no request; raise it, or lower "
                "workload.length_scale"
            )
    return np.concatenate(kept)


def _pairs_source(section: WorkloadSection) -> tuple[PairsOf, int | None]:
    if section.dataset is not None:
        chosen = dataset(section.dataset)
        return chosen.pairs(), chosen.max_total_tokens
    assert section.prompt_tokens is not None
    assert section.output_tokens is not None
    return pairs_of_distributions(lengths_of(section.prompt_tokens), lengths_of(section.output_tokens)), None


def _draw_arrivals(section: ArrivalSection, count: int, rng: np.random.Generator) -> Floats:
    """At one request per second, the first at 0."""
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
