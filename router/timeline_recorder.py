"""Records the timeline of one request over all its attempts."""

from tandem.core.session import PrefillFinished, TransferCommitted
from tandem.core.timeline import Stage, Timeline

_BEFORE_FIRST_TOKEN = (Stage.PREFILL_QUEUED, Stage.PREFILL_STARTED)
_BEFORE_SECOND_TOKEN = (
    Stage.DECODE_RESERVED,
    Stage.TRANSFER_STARTED,
    Stage.TRANSFER_COMMITTED,
    Stage.DECODE_ADMITTED,
)


class TimelineRecorder:
    """Timestamps of a failed attempt are discarded unless a token from it was delivered. All times are on the router's
    clock; an instance's durations are laid backwards from the arrival of the message that brought them, never before
    the stage they follow.
    """

    def __init__(self, received_s: float, admitted_s: float) -> None:
        self._stamps = {Stage.RECEIVED: received_s, Stage.ADMITTED: max(received_s, admitted_s)}
        self._num_cached_tokens = 0

    def begin_attempt(self, now_s: float) -> None:
        if Stage.FIRST_TOKEN not in self._stamps:
            self._forget(_BEFORE_FIRST_TOKEN)
            self._stamps[Stage.PREFILL_QUEUED] = now_s
        if Stage.SECOND_TOKEN not in self._stamps:
            self._forget(_BEFORE_SECOND_TOKEN)

    def prefill_started(self, now_s: float) -> None:
        if Stage.FIRST_TOKEN not in self._stamps:
            self._stamps[Stage.PREFILL_STARTED] = now_s

    def first_token(self, event: PrefillFinished, now_s: float) -> None:
        """The first token of an attempt; of a resumed request it is a later one, and no stage."""
        if Stage.FIRST_TOKEN in self._stamps:
            return
        self._stamps[Stage.PREFILL_STARTED] = max(self._stamps[Stage.PREFILL_QUEUED], now_s - event.compute_s)
        self._stamps[Stage.FIRST_TOKEN] = now_s
        self._num_cached_tokens = event.num_cached_tokens

    def kv_reserved(self, now_s: float) -> None:
        if Stage.SECOND_TOKEN not in self._stamps:
            self._stamps[Stage.DECODE_RESERVED] = now_s

    def transfer_committed(self, event: TransferCommitted, now_s: float) -> None:
        if Stage.SECOND_TOKEN not in self._stamps:
            started_s = now_s - event.transfer_s - event.streamed_s
            self._stamps[Stage.TRANSFER_STARTED] = max(self._stamps[Stage.ADMITTED], started_s)
            self._stamps[Stage.TRANSFER_COMMITTED] = now_s

    def decode_admitted(self, queue_s: float, now_s: float) -> None:
        """The first tokens of decode are here; they had waited `queue_s` for their step since the commit."""
        if Stage.SECOND_TOKEN not in self._stamps and Stage.TRANSFER_COMMITTED in self._stamps:
            self._stamps[Stage.DECODE_ADMITTED] = min(now_s, self._stamps[Stage.TRANSFER_COMMITTED] + queue_s)

    def second_token(self, now_s: float) -> None:
        self._stamps.setdefault(Stage.SECOND_TOKEN, now_s)

    def finished(self, now_s: float) -> None:
        self._stamps.setdefault(Stage.FINISHED, now_s)

    def timeline(self, *, num_prompt_tokens: int, num_output_tokens: int, num_attempts: int) -> Timeline:
        return Timeline(
            stamps=dict(self._stamps),
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_output_tokens=num_output_tokens,
            num_attempts=num_attempts,
        )

    def _forget(self, stages: tuple[Stage, ...]) -> None:
        for stage in stages:
            self._stamps.pop(stage, None)
