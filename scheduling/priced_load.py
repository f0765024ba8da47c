"""The load of one instance in seconds: what this router has sent there, priced with the instance's step costs.

Exact and immediate, as `known_instance`: it changes with what is dispatched and with the events of these attempts, not
with reports. Reports bring the step costs, which the instance corrects while it runs (`scheduling.predictor`).
"""

import math
from collections import Counter

from tandem.core.request_slo import RequestSlo
from tandem.core.step_coefficients import StepCoefficients, decode_step_s
from tandem.scheduling.budget import PREFILL_BATCH_TOKENS, RECOMPUTE_TOKENS
from tandem.scheduling.predictor import prefill_s

SHARE_TIME_S = 10.0
"""The share of the time that goes to prompts is a mean over about this time."""

MOST_SHARE = 0.9
LEAST_ROOM = 0.05  # of the time, that prompts get beside decoding, however tight its targets


class PricedLoad:
    """`costs` are to be set again with each report. `decoding` counts the sequences that decode there, or soon will;
    `context_tokens` are theirs. Time is passed in, and does not go back."""

    __slots__ = (
        "_decodes",
        "_progress_s",
        "_prompts",
        "_share",
        "_share_s",
        "_tpots",
        "context_tokens",
        "costs",
        "queued_s",
        "queued_tokens",
    )

    def __init__(self, costs: StepCoefficients) -> None:
        self.costs = costs
        self.queued_s = 0.0  # of prompts that are not computed yet
        self.queued_tokens = 0
        self.context_tokens = 0
        self._prompts: dict[int, tuple[float, int]] = {}  # by handle
        self._decodes: dict[int, tuple[int, RequestSlo]] = {}
        self._tpots: Counter[RequestSlo] = Counter()  # of those that decode
        self._progress_s = -math.inf  # when a prompt was finished, or came to an idle instance
        self._share = 0.0
        self._share_s = -math.inf

    @property
    def decoding(self) -> int:
        return len(self._decodes)

    # --- what happens ------------------------------------------------------------------------------------------------

    def add_prompt(self, handle: int, uncached: int, cached: int, now_s: float) -> None:
        seconds = self.price_s(uncached, cached)
        if not self._prompts:
            self._progress_s = now_s
        self._prompts[handle] = (seconds, uncached)
        self.queued_s += seconds
        self.queued_tokens += uncached
        self._share = self.prompt_share(now_s) + seconds / SHARE_TIME_S
        self._share_s = now_s

    def add_decode(self, handle: int, num_tokens: int, slo: RequestSlo) -> None:
        self._decodes[handle] = (num_tokens, slo)
        self.context_tokens += num_tokens
        self._tpots[slo] += 1

    def prompt_done(self, handle: int, now_s: float) -> None:
        """Computed, or given up."""
        if (prompt := self._prompts.pop(handle, None)) is not None:
            self.queued_s -= prompt[0]
            self.queued_tokens -= prompt[1]
            self._progress_s = now_s

    def remove(self, handle: int, now_s: float) -> None:
        """Nothing of it is there any more."""
        self.prompt_done(handle, now_s)
        if (decode := self._decodes.pop(handle, None)) is not None:
            self.context_tokens -= decode[0]
            self._tpots[decode[1]] -= 1
            if not self._tpots[decode[1]]:
                del self._tpots[decode[1]]

    # --- what is expected --------------------------------------------------------------------------------------------

    def price_s(self, uncached: int, cached: int) -> float:
        """Of a prompt among others: it shares a step with those that fit beside it."""
        alone_s = prefill_s(self.costs, uncached, cached, PREFILL_BATCH_TOKENS)
        return alone_s - self.costs.step_s * max(0.0, 1 - uncached / PREFILL_BATCH_TOKENS)

    def wait_s(self, now_s: float) -> float:
        """Until the prompts that are there now are computed, if the instance does nothing else."""
        return max(0.0, self.queued_s - (now_s - self._progress_s)) if self._prompts else 0.0

    def prompt_share(self, now_s: float) -> float:
        """Of the instance's time, lately."""
        if self._share == 0.0:
            return 0.0
        return self._share * math.exp((self._share_s - now_s) / SHARE_TIME_S)

    def tpot_s(self, rows: float, context_tokens: float, prompt_share: float) -> float:
        """Time per token of a batch, beside prompts that take that share of the time."""
        return decode_step_s(self.costs, rows, context_tokens) / (1 - min(MOST_SHARE, prompt_share))

    def local_ttft_s(self, uncached: int, cached: int, now_s: float) -> float:
        """Of a prompt that is computed in chunks beside those that decode, which their slack may shorten."""
        work_s = self.wait_s(now_s) + prefill_s(self.costs, uncached, cached, RECOMPUTE_TOKENS)
        if not self._decodes:
            return work_s
        step_s = decode_step_s(self.costs, self.decoding, self.context_tokens)
        num_steps = math.ceil((self.queued_tokens + uncached) / RECOMPUTE_TOKENS)
        tightest_s = min((slo.tpot_s for slo in self._tpots), default=math.inf)
        room = max(LEAST_ROOM, 1 - step_s / tightest_s)
        return max(work_s + num_steps * step_s, work_s / room)

    def tpot_targets(self) -> list[tuple[float, float]]:
        """(target, weight of all that have it) of those that decode."""
        return [(slo.tpot_s, count * slo.weight) for slo, count in self._tpots.items() if slo.tpot_s < math.inf]
