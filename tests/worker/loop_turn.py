"""One turn of an instance's loop, without its thread, and the tokens that a `FakeEngine` generates."""

from collections.abc import Sequence

from tandem.core.request import FinishReason
from tandem.core.session import PrefillFinished, TokenFrame
from tandem.prefill_worker.held_kv import KvComputing
from tandem.worker.loop import InstanceLoop
from tandem.worker.loop_messages import LoopEvent, SendEvent
from tests.fakes import next_token


def turn(loop: InstanceLoop) -> list[LoopEvent]:
    """Events of one turn, without those about prompts in progress."""
    return [event for event in turn_with_progress(loop) if not isinstance(event, KvComputing)]


def turn_with_progress(loop: InstanceLoop) -> list[LoopEvent]:
    """Events of one turn."""
    busy = loop.prepare()
    if busy:
        loop.launch()
    if loop.is_full or not busy:
        loop.collect()
    if not busy and not loop.has_steps:
        loop.idle()
    return loop.take_events()


def answer(events: list[LoopEvent], handle: int) -> tuple[list[int], FinishReason | None]:
    """Tokens that these events have for an attempt, and the reason for its end, if it has ended."""
    tokens: list[int] = []
    reason: FinishReason | None = None
    for event in events:
        match event:
            case SendEvent(_, PrefillFinished() as finished) if finished.handle == handle:
                tokens.append(finished.token.token_id)
                reason = finished.finish_reason
            case SendEvent(_, TokenFrame(items)):
                for item in items:
                    if item.handle == handle:
                        tokens += [token.token_id for token in item.tokens]
                        reason = item.finish_reason or reason
    return tokens, reason


def tokens_after(token_ids: Sequence[int], count: int) -> list[int]:
    """The next `count` tokens that a `FakeEngine` generates."""
    tokens = list(token_ids)
    for _ in range(count):
        tokens.append(next_token(tokens[-1:], len(tokens)))
    return tokens[len(token_ids) :]
