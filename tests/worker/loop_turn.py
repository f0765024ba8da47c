"""One turn of an instance's loop, without its thread."""

from tandem.worker.loop import InstanceLoop, LoopEvent


def turn(loop: InstanceLoop) -> list[LoopEvent]:
    if loop.prepare():
        loop.launch()
        loop.collect()
    else:
        loop.idle()
    return loop.take_events()
