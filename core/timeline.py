"""The timeline of one request: the one definition of its stages, of TTFT and of TPOT.

    received -> admitted -> prefill_queued -> prefill_started -> first_token
                                                  |                  |
                                        decode_reserved     transfer_started -> transfer_committed
                                                                                       |
                                                      decode_admitted -> second_token -> finished

All timestamps are seconds on the router's monotonic clock. Workers report durations, which the router places between
its own timestamps, so clocks of different machines are never compared. Metrics, the APIs, the simulator and the
benchmarks use this type.
"""

from dataclasses import dataclass
from enum import Enum


class Stage(Enum):
    """A moment in a request's life, in the usual order of time."""

    RECEIVED = "received"
    ADMITTED = "admitted"
    PREFILL_QUEUED = "prefill_queued"
    PREFILL_STARTED = "prefill_started"
    DECODE_RESERVED = "decode_reserved"
    FIRST_TOKEN = "first_token"
    TRANSFER_STARTED = "transfer_started"
    TRANSFER_COMMITTED = "transfer_committed"
    DECODE_ADMITTED = "decode_admitted"
    SECOND_TOKEN = "second_token"
    FINISHED = "finished"


# A part ends with its stage and begins with the previous stage of this list that happened. Stages that overlap with
# others (decode_reserved, transfer_started) are not in the list, so the parts sum to the total.
PARTS: tuple[tuple[Stage, str], ...] = (
    (Stage.ADMITTED, "admission_s"),  # validate, render, tokenize, wait in the router's queue
    (Stage.PREFILL_QUEUED, "dispatch_s"),  # select the prefill instance, send the request to it
    (Stage.PREFILL_STARTED, "prefill_queue_s"),
    (Stage.FIRST_TOKEN, "prefill_s"),
    (Stage.TRANSFER_COMMITTED, "transfer_s"),  # only what is exposed: KV that is streamed comes during prefill_s
    (Stage.DECODE_ADMITTED, "decode_queue_s"),
    (Stage.SECOND_TOKEN, "second_token_s"),
    (Stage.FINISHED, "decode_s"),
)


@dataclass(frozen=True, slots=True)
class Timeline:
    """Timestamps of one request. A stage that did not happen (no transfer for a one-token response) is absent."""

    stamps: dict[Stage, float]
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_attempts: int = 1

    def __post_init__(self) -> None:
        assert Stage.RECEIVED in self.stamps, "a timeline begins when the request is received"

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: from the request's arrival until its first token leaves the router. None without it."""
        first = self.stamps.get(Stage.FIRST_TOKEN)
        return None if first is None else first - self.stamps[Stage.RECEIVED]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (last - first) / (n - 1). None for fewer than two tokens."""
        first, last = self.stamps.get(Stage.FIRST_TOKEN), self.stamps.get(Stage.FINISHED)
        if first is None or last is None or self.num_output_tokens < 2:
            return None
        return (last - first) / (self.num_output_tokens - 1)

    @property
    def total_s(self) -> float:
        """From the request's arrival to its latest timestamp."""
        return max(self.stamps.values()) - self.stamps[Stage.RECEIVED]

    def intervals(self) -> list[tuple[str, float, float]]:
        """Name, begin and end of each part, in order and without gaps.

        A stage that was reported after a later stage takes no time, never negative time.
        """
        previous_s = self.stamps[Stage.RECEIVED]
        intervals = []
        for stage, name in PARTS:
            stamp_s = self.stamps.get(stage)
            if stamp_s is not None:
                end_s = max(previous_s, stamp_s)
                intervals.append((name, previous_s, end_s))
                previous_s = end_s
        return intervals

    def parts(self) -> dict[str, float]:
        """Seconds spent in each part, in order; they sum to `total_s` of a finished request."""
        return {name: end_s - begin_s for name, begin_s, end_s in self.intervals()}
