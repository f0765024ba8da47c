"""The load that this router has sent to one instance, in seconds by the instance's step costs.

As in `known_instance`, the load changes with attempts that are sent and with their events, not with reports. Reports
bring the step costs, which the instance corrects while it runs (`scheduling.predictor`).
"""

import math
from collections import Counter

from tandem.core.request_slo import RequestSlo
from tandem.core.step_coefficients import StepCoefficients, decode_step_s
from tandem.scheduling.budget import PREFILL_BATCH_TOKENS, RECOMPUTE_TOKENS
from tandem.scheduling.predictor import prefill_s

SHARE_TIME_S = 10.0  # time constant of the mean share of time that prompts take
MAX_PROMPT_SHARE = 0.9  # of an instance's time, at most, beside decoding sequences
MIN_PROMPT_SHARE = 0.05  # at least, however tight the targets of the decoding sequences are


class PricedLoad:
    """The caller sets `costs` with each report. `decoding` counts the sequences that decode on the instance or will,
    and `context_tokens` are their tokens. Time is passed in, and never decreases."""

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
        self._prompts: dict[int, tuple[float, int]] = {}  # handle -> seconds, uncached tokens
        self._decodes: dict[int, tuple[int, RequestSlo]] = {}  # handle -> tokens, targets
        self._tpots: Counter[RequestSlo] = Counter()  # of those that decode
        self._progress_s = -math.inf  # when a prompt was finished, or was sent to an instance without prompts
        self._share = 0.0  # of time that prompts take, at the time `_share_s`
        self._share_s = -math.inf

    @property
    def decoding(self) -> int:
        return len(self._decodes)

    # --- attempts ----------------------------------------------------------------------------------------------------

    def add_prompt(self, handle: int, uncached: int, cached: int, now_s: float) -> None:
        """A prompt was sent, of which `cached` tokens are cached there."""
        seconds = self.price_s(uncached, cached)
        if not self._prompts:
            self._progress_s = now_s
        self._prompts[handle] = (seconds, uncached)
        self.queued_s += seconds
        self.queued_tokens += uncached
        self._share = self.prompt_share(now_s) + seconds / SHARE_TIME_S
        self._share_s = now_s

    def add_decode(self, handle: int, num_tokens: int, slo: RequestSlo) -> None:
        """An attempt with `num_tokens` tokens decodes there, now or after its prefill."""
        self._decodes[handle] = (num_tokens, slo)
        self.context_tokens += num_tokens
        self._tpots[slo] += 1

    def prompt_done(self, handle: int, now_s: float) -> None:
        """The prompt is computed, or its attempt has ended."""
        if (prompt := self._prompts.pop(handle, None)) is not None:
            self.queued_s -= prompt[0]
            self.queued_tokens -= prompt[1]
            self._progress_s = now_s

    def remove(self, handle: int, now_s: float) -> None:
        """The attempt has ended there."""
        self.prompt_done(handle, now_s)
        if (decode := self._decodes.pop(handle, None)) is not None:
            self.context_tokens -= decode[0]
            self._tpots[decode[1]] -= 1
            if not self._tpots[decode[1]]:
                del self._tpots[decode[1]]

    # --- predictions -------------------------------------------------------------------------------------------------

    def price_s(self, uncached: int, cached: int) -> float:
        """Time of a prompt that shares its last step with other prompts."""
        alone_s = prefill_s(self.costs, uncached, cached, PREFILL_BATCH_TOKENS)
        return alone_s - self.costs.step_s * max(0.0, 1 - uncached / PREFILL_BATCH_TOKENS)

    def wait_s(self, now_s: float) -> float:
        """Time until the prompts of now are computed, if the instance does nothing else."""
        return max(0.0, self.queued_s - (now_s - self._progress_s)) if self._prompts else 0.0

    def prompt_share(self, now_s: float) -> float:
        """Share of the instance's recent time that prompts took."""
        if self._share == 0.0:
            return 0.0
        return self._share * math.exp((self._share_s - now_s) / SHARE_TIME_S)

    def tpot_s(self, rows: float, context_tokens: float, prompt_share: float) -> float:
        """TPOT of a batch of `rows` sequences, beside prompts that take `prompt_share` of the time."""
        return decode_step_s(self.costs, rows, context_tokens) / (1 - min(MAX_PROMPT_SHARE, prompt_share))

    def local_ttft_s(self, uncached: int, cached: int, now_s: float) -> float:
        """TTFT of a prompt that is computed in chunks beside decoding sequences, whose slack may shorten the chunks."""
        work_s = self.wait_s(now_s) + prefill_s(self.costs, uncached, cached, RECOMPUTE_TOKENS)
        if not self._decodes:
            return work_s
        step_s = decode_step_s(self.costs, self.decoding, self.context_tokens)
        num_steps = math.ceil((self.queued_tokens + uncached) / RECOMPUTE_TOKENS)
        tightest_s = min((slo.tpot_s for slo in self._tpots), default=math.inf)
        prompt_share = max(MIN_PROMPT_SHARE, 1 - step_s / tightest_s)
        return max(work_s + num_steps * step_s, work_s / prompt_share)

    def tpot_targets(self) -> list[tuple[float, float]]:
        """Pairs (TPOT target, total weight of the decoding sequences that have it)."""
        return [(slo.tpot_s, count * slo.weight) for slo, count in self._tpots.items() if slo.tpot_s < math.inf]
