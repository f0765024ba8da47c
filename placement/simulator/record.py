"""What happened to each request: stamps by the rules of the router (`router/timeline_recorder.py`)."""

import numpy as np

from tandem.core.timeline import Stage
from tandem.placement.simulator.result import STAGES
from tandem.placement.workload.requests import RequestStream

_COLUMN = {stage: column for column, stage in enumerate(STAGES)}
RECEIVED, ADMITTED = _COLUMN[Stage.RECEIVED], _COLUMN[Stage.ADMITTED]
PREFILL_QUEUED, PREFILL_STARTED = _COLUMN[Stage.PREFILL_QUEUED], _COLUMN[Stage.PREFILL_STARTED]
DECODE_RESERVED, FIRST_TOKEN = _COLUMN[Stage.DECODE_RESERVED], _COLUMN[Stage.FIRST_TOKEN]
TRANSFER_STARTED, TRANSFER_COMMITTED = _COLUMN[Stage.TRANSFER_STARTED], _COLUMN[Stage.TRANSFER_COMMITTED]
DECODE_ADMITTED, SECOND_TOKEN = _COLUMN[Stage.DECODE_ADMITTED], _COLUMN[Stage.SECOND_TOKEN]
FINISHED = _COLUMN[Stage.FINISHED]

_BEFORE_FIRST_TOKEN = [PREFILL_QUEUED, PREFILL_STARTED]
_BEFORE_SECOND_TOKEN = [DECODE_RESERVED, TRANSFER_STARTED, TRANSFER_COMMITTED, DECODE_ADMITTED]


class Record:
    """One row per request. Timestamps of a failed attempt are discarded unless a token from it was delivered.
    `refused_s`: when a request ended with an error, NaN for others."""

    __slots__ = ("num_attempts", "num_cached_tokens", "num_finished", "num_refused", "refused_s", "stamps")

    def __init__(self, requests: RequestStream) -> None:
        n = len(requests)
        self.stamps = np.full((n, len(STAGES)), np.nan)
        self.num_attempts = np.zeros(n, dtype=np.int64)
        self.num_cached_tokens = np.zeros(n, dtype=np.int64)
        self.refused_s = np.full(n, np.nan)
        self.num_finished = 0
        self.num_refused = 0

    def refuse(self, row: int, now_s: float) -> None:
        self.refused_s[row] = now_s
        self.num_refused += 1

    def begin_attempt(self, row: int, now_s: float) -> None:
        self.num_attempts[row] += 1
        if self.num_attempts[row] == 1:
            self.stamps[row, PREFILL_QUEUED] = now_s
            return
        stamps = self.stamps[row]
        if np.isnan(stamps[FIRST_TOKEN]):
            stamps[_BEFORE_FIRST_TOKEN] = np.nan
            stamps[PREFILL_QUEUED] = now_s
        if np.isnan(stamps[SECOND_TOKEN]):
            stamps[_BEFORE_SECOND_TOKEN] = np.nan

    def has(self, row: int, stage: int) -> bool:
        return not np.isnan(self.stamps[row, stage])
