"""The properties of an HTTP request besides its body."""

from dataclasses import dataclass

from tandem.core.request_trace import RequestTrace
from tandem.core.slo import UNSPECIFIED_SLO, RequestedSlo


@dataclass(frozen=True, slots=True)
class RequestContext:
    """`created_s` is on the wall clock, the other times on the router's clock.

    `echoed_id` goes into the x-request-id header of the response: the client's own id, or else `request_id`. `client`
    and `tenant` come from the API key or, without keys, from the connection and a header; `slo` comes from headers.
    """

    request_id: str
    echoed_id: str
    received_s: float
    deadline_s: float
    created_s: int
    wants_timeline: bool
    wants_explanation: bool = False
    client: str = ""
    tenant: str = ""
    slo: RequestedSlo = UNSPECIFIED_SLO
    trace: RequestTrace | None = None
