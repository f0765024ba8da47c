"""The requests of a load run: arrivals, lengths and prompts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tandem.core.errors import ConfigError
from tandem.core.slo_file import SloFile, WorkloadSection
from tandem.placement.workload.requests import RequestStream
from tandem.placement.workload.streams import make_stream
from tandem.placement.workload.traces import load_trace
from tandem.profiling.serving_profile import FIRST_TOKEN_ID, LAST_TOKEN_ID


def make_streams(
    slo: SloFile, trace: Path | None, rates: Sequence[float], count: int, seed: int
) -> tuple[tuple[float, RequestStream], ...]:
    """(rate, requests) of each run: the same requests at other times, and the same as `tandem simulate` makes for this
    file, rate, count and seed. Without rates: that of the trace, or of the workload. Raises ConfigError."""
    section = slo.workload if trace is None else WorkloadSection(trace=trace)
    if not rates and section.trace is not None:
        rates = (load_trace(section.trace).head(count).rate,)
    elif not rates and section.rate != "max":
        rates = (section.rate,)
    if not rates or min(rates) <= 0:
        raise ConfigError("neither the SLO file nor the trace has a request rate; give --rates")
    return tuple((rate, make_stream(section, slo.slo, count=count, rate=rate, seed=seed)) for rate in rates)


def prompts_of(stream: RequestStream, seed: int | None) -> list[list[int]]:
    """Token ids of every prompt: random, except for the prefix that a request shares with its group. Without a seed
    they differ each time, so that no server has them cached from an earlier run."""
    rng = np.random.default_rng(seed)
    longest = {int(group): 0 for group in np.unique(stream.prefix_group) if group >= 0}
    for group, length in zip(stream.prefix_group.tolist(), stream.prefix_tokens.tolist(), strict=True):
        if group >= 0:
            longest[group] = max(longest[group], length)
    shared = {group: rng.integers(FIRST_TOKEN_ID, LAST_TOKEN_ID, length).tolist() for group, length in longest.items()}
    prompts = []
    rows = (stream.prompt_tokens.tolist(), stream.prefix_group.tolist(), stream.prefix_tokens.tolist())
    for length, group, num_shared in zip(*rows, strict=True):
        head = shared[group][:num_shared] if group >= 0 else []
        prompts.append(head + rng.integers(FIRST_TOKEN_ID, LAST_TOKEN_ID, length - len(head)).tolist())
    return prompts
