"""Ranges of sampling parameters, for requests of clients and for attempts that an instance is given."""

import math

from tandem.core.errors import InvalidRequestError
from tandem.core.request import SamplingParams

MAX_LOGPROBS = 20

INT32_MAX = (1 << 31) - 1


def check_range(name: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    """Raises InvalidRequestError that names the field; also for NaN, which is in no range."""
    if low <= value <= high and not (above_low and value == low):
        return
    lower = f"above {low:g}" if above_low else f"at least {low:g}"
    upper = "" if math.isinf(high) else f" and at most {high:g}"
    raise InvalidRequestError(f"Invalid '{name}': it must be {lower}{upper}, but it is {value}.", param=name)


def check_sampling(sampling: SamplingParams) -> None:
    """Raises InvalidRequestError that names the first field out of its range. Token ids are not looked at."""
    check_range("temperature", sampling.temperature, 0.0, 2.0)
    check_range("top_p", sampling.top_p, 0.0, 1.0, above_low=True)
    check_range("top_k", sampling.top_k, 0, INT32_MAX)
    check_range("min_p", sampling.min_p, 0.0, 1.0)
    check_range("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    check_range("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    check_range("repetition_penalty", sampling.repetition_penalty, 0.0, 100.0, above_low=True)
    for name, count in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        if count is not None:
            check_range(name, count, 0, MAX_LOGPROBS)
