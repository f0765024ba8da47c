"""What steps mean for the sequences of a simulated instance, as `worker.output_processor` live."""

from tandem.placement.simulator.attempt import Listener, SimulatedAttempt
from tandem.placement.simulator.event_queue import EventQueue
from tandem.placement.simulator.held_kv import SimulatedHeldKv
from tandem.scheduling.chunk import Chunk
from tandem.scheduling.fast_forward import FastForward
from tandem.scheduling.fast_forward_scheduler import FastForwardScheduler
from tandem.scheduling.sequence import Sequence


class StepResults:
    """Used by one instance: sequences get their tokens, end, or are held for another instance."""

    def __init__(
        self, scheduler: FastForwardScheduler, held: SimulatedHeldKv, listener: Listener, events: EventQueue
    ) -> None:
        self._scheduler = scheduler
        self._held = held
        self._listener = listener
        self._events = events

    def computed(self, chunks: list[Chunk]) -> None:
        """The KV of the chunks is there."""
        for chunk in chunks:
            if self._scheduler.computed(chunk) and chunk.samples and chunk.sequence.hand_over:
                self._held.add(attempt_of(chunk.sequence), chunk.sequence)

    def drawn(self, chunks: list[Chunk], began_s: float) -> None:
        """The tokens of a step that began then are there."""
        for chunk in chunks:
            sequence = chunk.sequence
            if not chunk.samples:
                continue
            attempt = attempt_of(sequence)
            if sequence.hand_over:
                if self._held.get(attempt) is sequence:
                    self._tell_first_token(sequence)
            elif self._scheduler.get(attempt) is sequence:
                is_first = not sequence.has_first_token
                self._scheduler.generated(attempt, 0)
                if is_first:
                    sequence.first_token_s = self._events.now_s
                    self._tell_first_token(sequence)
                elif sequence.num_tokens == len(sequence.request.token_ids) + 2:
                    self._listener.second_token(attempt, began_s, self._events.now_s)
                if sequence.num_tokens >= self._scheduler.length_limit(sequence):
                    self._finish(sequence)

    def decoded(self, steps: FastForward, num_done: int, began_s: float, first_end_s: float) -> None:
        """`num_done` steps of all that decode are done, the first, which began at `began_s`, at `first_end_s`."""
        for sequence in steps.newcomers:
            self._listener.second_token(attempt_of(sequence), began_s, first_end_s)
        for sequence in self._scheduler.advance(num_done):
            self._finish(sequence)

    def _tell_first_token(self, sequence: Sequence) -> None:
        assert sequence.started_s is not None, "what is finished was started"
        self._listener.prefill_finished(attempt_of(sequence), sequence.started_s)

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence.key)
        self._listener.decode_finished(attempt_of(sequence))


def attempt_of(sequence: Sequence) -> SimulatedAttempt:
    assert isinstance(sequence.key, SimulatedAttempt)
    return sequence.key
