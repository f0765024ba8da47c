"""One turn of an instance's loop, without its thread."""

from tandem.prefill_worker.held_kv import KvComputing
from tandem.worker.loop import InstanceLoop
from tandem.worker.loop_messages import LoopEvent


def turn(loop: InstanceLoop) -> list[LoopEvent]:
    """Its events, without those about prompts in progress."""
    return [event for event in turn_with_progress(loop) if not isinstance(event, KvComputing)]


def turn_with_progress(loop: InstanceLoop) -> list[LoopEvent]:
    busy = loop.prepare()
    if busy:
        loop.launch()
    if loop.is_full or not busy:
        loop.collect()
    if not busy and not loop.has_steps:
        loop.idle()
    return loop.take_events()
