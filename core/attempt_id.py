"""The id of one attempt of one request on an instance."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttemptId:
    """`handle` is the number that the router of the session gave the attempt."""

    session_id: int
    handle: int
