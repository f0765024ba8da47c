"""A decode instance: `decode_worker.loop` with a cost model in the engine's place."""

from collections.abc import Callable

from core.cost_model import StepLoad, pairs
from core.errors import TandemError
from placement.deployment import InstanceSpec
from placement.result import InstanceUse
from placement.simulator.agenda import Agenda
from placement.simulator.attempt import Attempt, Listener
from placement.simulator.counted import CountedPool, CountedSequence
from placement.simulator.steady_run import SteadyRun
from placement.simulator.use import StepTotals
from scheduling.decode import DecodeChunk, DecodePolicy, DecodeScheduler
from scheduling.sequence import Sequence, SequenceState


class DecodeInstance:
    """Commands that come during a step are applied when it ends, as live.

    While the batch stays the same its steps are one event. A command cuts such a run short, at the end of the step
    that is under way. `step_by_step` does without: slow, and the reference for the runs.
    """

    def __init__(self, spec: InstanceSpec, agenda: Agenda, listener: Listener, *, step_by_step: bool = False) -> None:
        self.spec = spec
        self._agenda = agenda
        self._listener = listener
        self._step_by_step = step_by_step
        self._pool = CountedPool(spec.num_blocks)
        policy = DecodePolicy(spec.max_batch, spec.max_queue, spec.growth_horizon_tokens)
        self._scheduler = DecodeScheduler(policy, self._pool, spec.block_size, spec.max_model_len)
        self._commands: list[tuple[Callable[[Attempt], None], Attempt]] = []
        self._is_up = True
        self._step: list[DecodeChunk] | SteadyRun | None = None  # what is computed now
        self._totals = StepTotals(spec.cost)

    @property
    def max_model_len(self) -> int:
        return self._scheduler.max_model_len

    def open(self, attempt: Attempt) -> None:
        """Queue it for a reservation."""
        if self._scheduler.has_waiting:
            self._open(attempt)  # behind others, for whom the next step's end changes nothing
        else:
            self._command(self._open, attempt)

    def arrived(self, attempt: Attempt) -> None:
        """Its KV is here."""
        self._command(self._arrived, attempt)

    def close(self, attempt: Attempt) -> None:
        """Give it up in whatever phase it is."""
        self._command(self._close, attempt)

    def fail(self) -> None:
        """What it computes is lost; the router takes its attempts off it, one `close` after the other."""
        if isinstance(self._step, SteadyRun):
            self._step.cut(self._agenda.now_s)
            self._take_run(self._step, self._step.num_steps - 1)  # without the one under way
        self._is_up = False
        self._step = None
        self._commands.clear()

    def restart(self) -> None:
        self._is_up = True

    def use(self) -> InstanceUse:
        counts = self._scheduler.counts()
        return InstanceUse(
            instance_id=self.spec.instance_id,
            role=self.spec.role,
            steps=self._totals.steps,
            busy_s=self._totals.busy_s,
            prefill_tokens=0,
            decode_tokens=counts.computed_tokens,
            cached_tokens=0,
            preemptions=counts.preemptions,
            peak_blocks=self._pool.peak_held,
            num_blocks=self.spec.num_blocks,
            cost_terms_s=self._totals.cost_terms_s(),
        )

    def check_idle(self) -> None:
        """Assert that nothing is left of any request."""
        assert len(self._scheduler) == 0
        assert self._pool.num_held == 0

    # --- commands ----------------------------------------------------------------------------------------------------

    def _command(self, apply: Callable[[Attempt], None], attempt: Attempt) -> None:
        if not self._is_up:
            apply(attempt)
            return
        self._commands.append((apply, attempt))
        if self._step is None:
            self._turn()
        elif isinstance(self._step, SteadyRun) and self._step.cut(self._agenda.now_s):
            self._agenda.at_step_end(self._step.end_s, self._end_run, self._step)

    def _open(self, attempt: Attempt) -> None:
        try:
            self._scheduler.add(CountedSequence(attempt, attempt.request, self._agenda.now_s))
        except TandemError as error:
            self._listener.failed(attempt, self.spec.instance_id, error)

    def _arrived(self, attempt: Attempt) -> None:
        if self._scheduler.get(attempt) is not None:
            self._scheduler.committed(attempt, 0, self._agenda.now_s)
            self._listener.transfer_committed(attempt)

    def _close(self, attempt: Attempt) -> None:
        sequence = self._scheduler.get(attempt)
        if sequence is not None:
            if sequence.state in (SequenceState.RUNNING, SequenceState.PREEMPTED):
                attempt.num_handed_on = sequence.num_generated
            self._scheduler.cancel(attempt)

    # --- steps -------------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """What happens between two steps, and the beginning of the next."""
        now_s = self._agenda.now_s
        self._step = None
        if self._commands:
            commands, self._commands = self._commands, []
            for apply, attempt in commands:
                apply(attempt)
        for sequence in self._scheduler.reserve(now_s):
            self._listener.decode_reserved(_attempt(sequence))
        steady = None if self._step_by_step else self._scheduler.steady()
        if steady is not None:
            self._step = run = SteadyRun(steady, self.spec.cost.decode_line(steady.num_sequences), now_s)
            self._agenda.at_step_end(run.end_s, self._end_run, run)
        elif chunks := self._scheduler.next_batch(now_s):
            self._step = chunks
            step_s = self._totals.count_step(_load(chunks))
            self._agenda.at_step_end(now_s + step_s, self._end_step, chunks)

    def _end_step(self, chunks: list[DecodeChunk]) -> None:
        if self._step is not chunks:
            return  # lost with the instance
        now_s = self._agenda.now_s
        for chunk in chunks:
            if not self._scheduler.computed(chunk) or not chunk.samples:
                continue
            sequence = self._scheduler.generated(chunk.sequence.key, 0)
            if sequence.num_tokens == len(sequence.request.token_ids) + 2:  # prefill's, and the first of its own
                assert sequence.started_s is not None, "what was computed was started"
                self._listener.second_token(_attempt(sequence), sequence.started_s, now_s)
            if sequence.num_tokens >= self._scheduler.length_limit(sequence):
                self._finish(sequence)
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
        second_s = run.start_s + run.first_step_s
        for sequence in run.steady.newcomers:
            self._listener.second_token(_attempt(sequence), run.start_s, second_s)
        for sequence in self._scheduler.advance(num_done, run.start_s):
            self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence.key)
        self._listener.decode_finished(_attempt(sequence))


def _attempt(sequence: Sequence) -> Attempt:
    assert isinstance(sequence.key, Attempt)
    return sequence.key


def _load(chunks: list[DecodeChunk]) -> StepLoad:
    """Sequences that are recomputed count as prompts."""
    again = [chunk for chunk in chunks if chunk.num_tokens > 1]
    steady = [chunk for chunk in chunks if chunk.num_tokens == 1]
    return StepLoad(
        prefill_tokens=sum(chunk.num_tokens for chunk in again),
        prefill_sequences=len(again),
        prefill_pairs=sum(pairs(chunk.start, chunk.num_tokens) for chunk in again),
        prefill_kv_tokens=sum(chunk.start + chunk.num_tokens for chunk in again),
        decode_sequences=len(steady),
        decode_kv_tokens=sum(chunk.start + 1 for chunk in steady),
        sampled=sum(chunk.samples for chunk in chunks),
    )
