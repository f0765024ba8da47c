"""Descriptions of a workload for reports: one phrase and a summary of its requests."""

import numpy as np

from tandem.core.slo_file import WorkloadSection
from tandem.placement.evidence import WorkloadSummary
from tandem.placement.workload.requests import Ints, RequestStream

_MAX_LENGTHS = 4000


def describe(section: WorkloadSection) -> str:
    """One phrase, e.g. 'data set sharegpt, Poisson arrivals'."""
    if section.trace is not None:
        return f"trace {section.trace.name}"
    if section.populations:
        total = sum(population.share for population in section.populations)
        return "populations " + ", ".join(
            f"{population.name} {population.share / total:.0%}" for population in section.populations
        )
    bursts = "Poisson arrivals" if section.arrivals.process == "poisson" else f"arrivals of cv {section.arrivals.cv:g}"
    return f"{_lengths_phrase(section)}, {bursts}"


def _lengths_phrase(section: WorkloadSection) -> str:
    if section.dataset is not None:
        return f"data set {section.dataset}"
    if section.lengths is not None:
        return f"lengths of {section.lengths.name}"
    assert section.prompt_tokens is not None
    assert section.output_tokens is not None
    both = section.prompt_tokens, section.output_tokens
    if any(one.mixture for one in both):
        return "mixed lengths"
    if any(one.table is not None for one in both):
        return "measured lengths"
    return f"{' and '.join(dict.fromkeys(one.distribution for one in both))} lengths"


def summary_of(requests: RequestStream, source: str) -> WorkloadSummary:
    """`source`: the phrase of `describe`."""
    step = max(1, -(-len(requests) // _MAX_LENGTHS))
    return WorkloadSummary(
        source=source,
        num_requests=len(requests),
        prompt_tokens=tuple(requests.prompt_tokens[::step].tolist()),
        output_tokens=tuple(requests.output_tokens[::step].tolist()),
        arrival_cv=arrival_cv(requests),
        shared_prefix_share=shared_share(requests),
    )


def shared_share(stream: RequestStream) -> float:
    """Share of the prompt tokens that repeat a prefix of an earlier request: the most that a prefix cache can save."""
    return int(repeated_tokens(stream).sum()) / max(1, int(stream.prompt_tokens.sum()))


def repeated_tokens(stream: RequestStream) -> Ints:
    """Prompt tokens of each request that repeat a prefix of an earlier one."""
    repeated = np.zeros(len(stream), dtype=np.int64)
    if not np.any(stream.prefix_group >= 0):
        return repeated
    longest: dict[int, int] = {}
    for row, (group, tokens) in enumerate(
        zip(stream.prefix_group.tolist(), stream.prefix_tokens.tolist(), strict=True)
    ):
        if group >= 0:
            known = longest.get(group, 0)
            repeated[row] = min(known, tokens)
            longest[group] = max(known, tokens)
    return repeated


def arrival_cv(stream: RequestStream) -> float:
    """Coefficient of variation of the times between arrivals: 1 for Poisson arrivals, more for bursts, 0 if all
    requests arrive at once."""
    gaps_s = np.diff(stream.arrival_s)
    return float(gaps_s.std() / gaps_s.mean()) if len(gaps_s) and gaps_s.mean() > 0 else 0.0
