"""What decode and colocated instances have in common: commands between steps, and runs of equal steps as one event."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from tandem.placement.simulator.agenda import Agenda
from tandem.placement.simulator.attempt import Attempt, Listener
from tandem.placement.simulator.deployment import InstanceSpec
from tandem.placement.simulator.steady_run import SteadyRun
from tandem.placement.simulator.use import StepTotals
from tandem.scheduling.colocated import ColocatedScheduler
from tandem.scheduling.sequence import Sequence, SequenceState
from tandem.scheduling.steady_decode import SteadyDecodeScheduler


class SteppingInstance(ABC):
    """A worker's loop with a cost model in the engine's place.

    Commands that come during a step are applied when it ends, as live. While the batch stays the same its steps are
    one event; a command cuts such a run short, at the end of the step that is under way. `step_by_step` does without
    runs: slow, and the reference for them.
    """

    def __init__(
        self,
        spec: InstanceSpec,
        scheduler: SteadyDecodeScheduler | ColocatedScheduler,
        agenda: Agenda,
        listener: Listener,
        *,
        step_by_step: bool,
    ) -> None:
        self.spec = spec
        self._steady_scheduler = scheduler
        self._agenda = agenda
        self._listener = listener
        self._step_by_step = step_by_step
        self._commands: list[tuple[Callable[[Attempt], None], Attempt]] = []
        self._is_up = True
        self._step: list[Any] | SteadyRun | None = None  # what is computed now: chunks, or a run
        self._began_s = 0.0  # when it began
        self._late_s = 0.0  # how much later its chunks are computed than they would be without the commands meanwhile
        self._totals = StepTotals(spec.cost)

    @property
    def max_model_len(self) -> int:
        return self._steady_scheduler.max_model_len

    def close(self, attempt: Attempt) -> None:
        """Give it up in whatever phase it is."""
        self._command(self._close, attempt)

    def fail(self) -> None:
        """What it computes is lost; the router takes its attempts off it, one `close` after the other."""
        if isinstance(self._step, SteadyRun):
            self._step.cut(self._agenda.now_s)
            self._take_run(self._step, self._step.num_steps - 1)  # without the one under way
        self._totals.count_more(self._late_s)
        self._late_s = 0.0
        self._is_up = False
        self._step = None
        self._commands.clear()

    def restart(self) -> None:
        self._is_up = True

    @abstractmethod
    def _admit(self) -> None:
        """What else there is to do between two steps."""

    @abstractmethod
    def _compute(self) -> tuple[list[Any], float]:
        """The chunks of the next step, none if there is nothing to do, and the seconds they take."""

    @abstractmethod
    def _computed(self, chunks: list[Any]) -> None:
        """Take their results up."""

    def _command(self, apply: Callable[[Attempt], None], attempt: Attempt, late_s: float = 0.0) -> None:
        """`late_s`: how much longer a step takes during which it comes."""
        if not self._is_up:
            apply(attempt)
            return
        self._commands.append((apply, attempt))
        if self._step is None:
            self._turn()
        elif not isinstance(self._step, SteadyRun):
            self._late_s += late_s
        elif self._step.cut(self._agenda.now_s, late_s):
            self._agenda.at_step_end(self._step.end_s, self._end_run, self._step)

    def _close(self, attempt: Attempt) -> None:
        sequence = self._steady_scheduler.get(attempt)
        if sequence is not None:
            if sequence.state in (SequenceState.RUNNING, SequenceState.PREEMPTED):
                attempt.num_handed_on = sequence.num_generated
            self._steady_scheduler.cancel(attempt)

    def _turn(self) -> None:
        """What happens between two steps, and the beginning of the next."""
        now_s = self._agenda.now_s
        self._step = None
        self._began_s = now_s
        if self._commands:
            commands, self._commands = self._commands, []
            for apply, attempt in commands:
                apply(attempt)
        self._admit()
        steady = None if self._step_by_step else self._steady_scheduler.steady()
        if steady is not None:
            line = self.spec.cost.decode_coefficients(steady.num_sequences)
            self._step = run = SteadyRun(steady, line, now_s)
            self._agenda.at_step_end(run.end_s, self._end_run, run)
            return
        chunks, step_s = self._compute()
        if chunks:
            self._step = chunks
            self._agenda.at_step_end(now_s + step_s, self._end_step, chunks)

    def _end_step(self, chunks: list[Any]) -> None:
        if self._step is not chunks:
            return  # lost with the instance
        if self._late_s > 0:
            late_s, self._late_s = self._late_s, 0.0
            self._totals.count_more(late_s)
            self._agenda.at_step_end(self._agenda.now_s + late_s, self._end_step, chunks)
            return
        self._computed(chunks)
        self._turn()

    def _end_run(self, run: SteadyRun) -> None:
        if self._step is not run or run.end_s != self._agenda.now_s:
            return  # lost with the instance, or cut short meanwhile
        self._take_run(run, run.num_steps)
        self._turn()

    def _take_run(self, run: SteadyRun, num_done: int) -> None:
        """So many of its steps are done."""
        self._totals.count_run(run)
        if num_done == 0:
            return
        second_s = run.end_of(1)
        for sequence in run.steady.newcomers:
            self._listener.second_token(attempt_of(sequence), run.began_s, second_s)
        for sequence in self._steady_scheduler.advance(num_done, run.began_s):
            self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        self._steady_scheduler.finish(sequence.key)
        self._listener.decode_finished(attempt_of(sequence))

    def _finish_if_long_enough(self, sequence: Sequence) -> None:
        if sequence.num_tokens >= self._steady_scheduler.length_limit(sequence):
            self._finish(sequence)


def attempt_of(sequence: Sequence) -> Attempt:
    assert isinstance(sequence.key, Attempt)
    return sequence.key
