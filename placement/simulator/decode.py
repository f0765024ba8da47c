"""A decode instance: `decode_worker.loop` with a cost model in the engine's place."""

from collections.abc import Callable

from core.cost_model import StepLoad, pairs
from core.errors import TandemError
from placement.deployment import InstanceSpec
from placement.result import InstanceUse
from placement.simulator.agenda import Agenda
from placement.simulator.attempt import Attempt, Listener
from placement.simulator.counted import CountedPool, CountedSequence
from scheduling.decode import DecodeChunk, DecodePolicy, DecodeScheduler
from scheduling.sequence import Sequence


class DecodeInstance:
    """Commands that come during a step are applied when it ends, as live."""

    def __init__(self, spec: InstanceSpec, agenda: Agenda, listener: Listener) -> None:
        self.spec = spec
        self._agenda = agenda
        self._listener = listener
        self._pool = CountedPool(spec.num_blocks)
        policy = DecodePolicy(spec.max_batch, spec.max_queue, spec.growth_horizon_tokens)
        self._scheduler = DecodeScheduler(policy, self._pool, spec.block_size, spec.max_model_len)
        self._commands: list[tuple[Callable[[Attempt], None], Attempt]] = []
        self._is_up = True
        self._is_busy = False
        self._life = 0  # how often it was lost; what an earlier life computed is dropped
        self._steps = 0
        self._busy_s = 0.0

    @property
    def max_model_len(self) -> int:
        return self._scheduler.max_model_len

    def open(self, attempt: Attempt) -> None:
        """Queue it for a reservation."""
        self._command(self._open, attempt)

    def arrived(self, attempt: Attempt) -> None:
        """Its KV is here."""
        self._command(self._arrived, attempt)

    def close(self, attempt: Attempt) -> None:
        """Give it up in whatever phase it is."""
        self._command(self._close, attempt)

    def use(self) -> InstanceUse:
        counts = self._scheduler.counts()
        return InstanceUse(
            instance_id=self.spec.instance_id,
            role=self.spec.role,
            steps=self._steps,
            busy_s=self._busy_s,
            prefill_tokens=0,
            decode_tokens=counts.computed_tokens,
            cached_tokens=0,
            preemptions=counts.preemptions,
            peak_blocks=self._pool.peak_held,
            num_blocks=self.spec.num_blocks,
        )

    def fail(self) -> None:
        """What it computes is lost; the router takes its attempts off it."""
        self._is_up = self._is_busy = False
        self._life += 1
        self._commands.clear()

    def restart(self) -> None:
        self._is_up = True

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
        if not self._is_busy:
            self._turn()

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
        self._scheduler.cancel(attempt)

    # --- steps -------------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """What happens between two steps, and the beginning of the next."""
        now_s = self._agenda.now_s
        commands, self._commands = self._commands, []
        for apply, attempt in commands:
            apply(attempt)
        for sequence in self._scheduler.reserve(now_s):
            self._listener.decode_reserved(_attempt(sequence))
        chunks = self._scheduler.next_batch(now_s)
        self._is_busy = bool(chunks)
        if chunks:
            step_s = self.spec.cost.step(_load(chunks)).total_s
            self._steps += 1
            self._busy_s += step_s
            self._agenda.at_step_end(now_s + step_s, self._end_step, (chunks, self._life))

    def _end_step(self, step: tuple[list[DecodeChunk], int]) -> None:
        chunks, life = step
        if life != self._life:
            return
        now_s = self._agenda.now_s
        for chunk in chunks:
            if not self._scheduler.computed(chunk) or not chunk.samples:
                continue
            sequence = self._scheduler.generated(chunk.sequence.key, 0)
            attempt = _attempt(sequence)
            attempt.num_handed_on = sequence.num_generated
            if not attempt.has_second_token:
                assert sequence.started_s is not None, "what was computed was started"
                self._listener.second_token(attempt, sequence.started_s, now_s)
            if sequence.num_tokens >= self._scheduler.length_limit(sequence):
                self._scheduler.finish(attempt)
                self._listener.decode_finished(attempt)
        self._turn()


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
