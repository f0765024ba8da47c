"""Ranges of sampling parameters, for requests of clients and for attempts that an instance is given."""

import math
from typing import NamedTuple

from tandem.core.errors import InvalidRequestError
from tandem.core.request import SamplingParams

MAX_LOGPROBS = 20

INT32_MAX = (1 << 31) - 1


def check_range(name: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    """Raises InvalidRequestError that names the field; also for NaN, which is in no range."""
    if low <= value <= high and not (above_low and value == low):
        return
    lower = f"above {_shown(low)}" if above_low else f"at least {_shown(low)}"
    upper = "" if math.isinf(high) else f" and at most {_shown(high)}"
    raise InvalidRequestError(f"Invalid '{name}': it must be {lower}{upper}, but it is {value}.", param=name)


def _shown(bound: float) -> str:
    """Whole numbers with all their digits: a client may send just that one."""
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"


class Range(NamedTuple):
    low: float
    high: float
    above_low: bool = False  # the lowest value itself is not allowed


RANGES = {
    "temperature": Range(0.0, 2.0),
    "top_p": Range(0.0, 1.0, above_low=True),
    "top_k": Range(0, INT32_MAX),
    "min_p": Range(0.0, 1.0),
    "presence_penalty": Range(-2.0, 2.0),
    "frequency_penalty": Range(-2.0, 2.0),
    "repetition_penalty": Range(0.0, 100.0, above_low=True),
    "logprobs": Range(0, MAX_LOGPROBS),
    "prompt_logprobs": Range(0, MAX_LOGPROBS),
}


def check_sampling(sampling: SamplingParams) -> None:
    """Raises InvalidRequestError that names the first field out of its range. Token ids are not looked at."""
    for name, (low, high, above_low) in RANGES.items():
        value = getattr(sampling, name)
        if value is not None:
            check_range(name, value, low, high, above_low=above_low)
