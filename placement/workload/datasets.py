"""Built-in data sets of prompt and output lengths."""

import gzip
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from tandem.core.errors import ConfigError
from tandem.core.slo_file import LengthPart, LengthSection
from tandem.placement.workload.length_tables import parse_pairs, parse_table
from tandem.placement.workload.lengths import LengthSampler, TruncatedLogNormal, independent_sampler, lengths_of
from tandem.placement.workload.requests import Floats, Ints

T = TypeVar("T")

_LONGBENCH_CUT_SHARE = 0.825  # of the requests whose context is longer than the cut; gives the mean of the prompts


@dataclass(frozen=True, slots=True)
class Dataset:
    """A built-in data set of lengths. Requests with more than `max_total_tokens` prompt and output tokens are left
    out."""

    summary: str
    sampler: Callable[[], LengthSampler]
    max_total_tokens: int | None = None


def _pairs(name: str) -> Callable[[], LengthSampler]:
    """A table of requests in placement/data."""
    return lambda: _packaged(f"lengths_{name}.csv.gz", parse_pairs).sample


def _marginals(name: str) -> Callable[[], LengthSampler]:
    """Two tables in placement/data; how prompt and output lengths go together is not known."""

    def sampler() -> LengthSampler:
        prompts, outputs = (_packaged(f"lengths_{name}_{part}.csv.gz", parse_table) for part in ("prompt", "output"))
        return independent_sampler(prompts.sample, outputs.sample)

    return sampler


def _distserve_sharegpt() -> LengthSampler:
    """Not public; the means and limits are (OSDI '24, Figure 7 and section 6.1). These values of mu give the means
    after the limit on the sum; sigma reproduces the published attainment curves. Quantiles: p50 663 and 137, p90 1,454
    and 436."""
    prompt = TruncatedLogNormal(6.76152, 0.95, 0.5, 2047.49)
    output = TruncatedLogNormal(4.96681, 0.95, 0.5, 2047.49)
    return independent_sampler(prompt.sample, output.sample)


def _distserve_longbench() -> LengthSampler:
    """Not public either. What is: the means, and that a context is cut to a random length of 1,900 to 2,048 tokens and
    to what the answer leaves of 2,040. LongBench has 4,750 samples, and answers of two kinds: summaries and answers in
    sentences (GovReport, QMSum, MultiNews, VCSUM, DuReader: 1,000 samples), and a name, class or line of code. The
    mean of either kind is chosen for the published mean; the coefficient of variation of all answers is 2.2."""
    short = LengthPart(share=3750, mean=16, cv=1.2, max=128)
    long = LengthPart(share=1000, mean=370.9, cv=0.8, min=20, max=1500)
    answers = lengths_of(LengthSection(mixture=(short, long)))

    def sample(uniform: Floats) -> Ints:
        output = answers(uniform[:, 1])
        share = _LONGBENCH_CUT_SHARE
        position = uniform[:, 0]
        cut = 1900 + 149 * position / share
        uncut = 1 + 1899 * (position - share) / (1 - share)
        prompt = np.where(position < share, cut, uncut).astype(np.int64)
        return np.stack([np.minimum(prompt, 2040 - output), output], axis=1)

    return sample


DATASETS: Mapping[str, Dataset] = MappingProxyType(
    {
        "sharegpt": Dataset("ShareGPT, first turns, Llama-2 tokens", _pairs("sharegpt")),
        "openchat": Dataset("ShareGPT-4, many turns, Llama-2 tokens", _pairs("openchat")),
        "humaneval": Dataset("HumanEval code completion, OPT tokens", _pairs("humaneval")),
        "arxiv": Dataset("arXiv summaries, Llama-2 tokens", _pairs("arxiv")),
        "azure_conv": Dataset("Azure 2023, conversation service", _pairs("azure_conv")),
        "azure_code": Dataset("Azure 2023, code completion service", _pairs("azure_code")),
        "azure_2024_conv": Dataset("Azure 2024, a week of conversations", _marginals("azure_2024_conv")),
        "azure_2024_code": Dataset("Azure 2024, a week of code completion", _marginals("azure_2024_code")),
        "servegen_r1": Dataset("ServeGen, a day of DeepSeek-R1, reasoning included", _marginals("servegen_r1")),
        "distserve_sharegpt": Dataset(
            "DistServe's ShareGPT by its means, 755.5 and 200.3 tokens", _distserve_sharegpt, max_total_tokens=2047
        ),
        "distserve_longbench": Dataset(
            "DistServe's LongBench by its means, 1,738.3 and 90.7 tokens", _distserve_longbench, max_total_tokens=2040
        ),
    }
)


def dataset(name: str) -> Dataset:
    """Raises ConfigError for an unknown name."""
    if name not in DATASETS:
        raise ConfigError(f"the data set '{name}' is unknown; the built-in data sets are {', '.join(DATASETS)}")
    return DATASETS[name]


@cache
def _packaged(name: str, parse: Callable[[Path, Iterable[str]], T]) -> T:
    packed = files("tandem.placement").joinpath("data", name).read_bytes()
    return parse(Path(name), io.StringIO(gzip.decompress(packed).decode()))
