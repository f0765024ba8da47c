"""How an instance names one attempt of one request."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttemptId:
    """`handle` is the number that the router of that session gave the attempt."""

    session_id: int
    handle: int
