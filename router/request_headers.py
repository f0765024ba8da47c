"""Headers of HTTP requests that say who sends a request and how it is to be served."""

import re

from starlette.datastructures import Headers

from tandem.core.errors import InvalidRequestError
from tandem.core.sampling_ranges import check_range
from tandem.core.slo import MAX_TARGET_S, RequestedSlo
from tandem.router.limits import clipped

SLO = "x-tandem-slo"
TTFT_MS = "x-llm-d-slo-ttft-ms"  # as llm-d's router names them
TPOT_MS = "x-llm-d-slo-tpot-ms"
TENANT = "x-tandem-tenant"
AUTHORIZATION = "authorization"

_MILLISECONDS = re.compile(r"[0-9]+(\.[0-9]+)?", re.ASCII)
_MAX_CHARS = 32


def requested_slo(headers: Headers) -> RequestedSlo:
    """Raises InvalidRequestError that names the header."""
    return RequestedSlo(_one(headers, SLO), _seconds(headers, TTFT_MS), _seconds(headers, TPOT_MS))


def authorization(headers: Headers) -> str:
    """Empty if it is not given."""
    return _one(headers, AUTHORIZATION)


def tenant(headers: Headers) -> str:
    """Empty if it is not given."""
    return _one(headers, TENANT)


def _one(headers: Headers, name: str) -> str:
    values = headers.getlist(name)
    if len(values) > 1:
        raise InvalidRequestError(f"The header '{name}' is given {len(values)} times.", param=name)
    return values[0].strip() if values else ""


def _seconds(headers: Headers, name: str) -> float | None:
    text = _one(headers, name)
    if not text:
        return None
    if len(text) > _MAX_CHARS or not _MILLISECONDS.fullmatch(text):
        raise InvalidRequestError(
            f"Invalid '{name}': it must be a number of milliseconds such as 250, but it is '{clipped(text)}'.",
            param=name,
        )
    milliseconds = float(text)
    check_range(name, milliseconds, 0.0, MAX_TARGET_S * 1e3, above_low=True)
    return milliseconds / 1e3
