"""A prefill instance: `prefill_worker.loop` with a cost model in the engine's place."""

from tandem.core.cost_model import StepLoad
from tandem.core.errors import TandemError
from tandem.placement.simulator.agenda import Agenda
from tandem.placement.simulator.attempt import Attempt, Listener
from tandem.placement.simulator.counted import CountedSequence
from tandem.placement.simulator.deployment import PAUSE_S, InstanceSpec
from tandem.placement.simulator.load import load_of
from tandem.placement.simulator.prefixes import BlockNames, pool_and_index
from tandem.placement.simulator.result import InstanceUse
from tandem.placement.simulator.use import StepTotals
from tandem.scheduling.prefill import PrefillChunk, PrefillPolicy, PrefillScheduler
from tandem.scheduling.sequence import Sequence


class PrefillInstance:
    """Computed KV stays until `release`. Through a pipeline a step may begin while earlier ones are still under way;
    their results come in order."""

    def __init__(self, spec: InstanceSpec, agenda: Agenda, listener: Listener, names: BlockNames | None = None) -> None:
        self.spec = spec
        self._agenda = agenda
        self._listener = listener
        self._pool, self._index = pool_and_index(spec, names)
        self._names = names
        policy = PrefillPolicy(spec.max_batch_tokens, spec.max_queue)
        self._scheduler = PrefillScheduler(policy, self._pool, self._index, spec.block_size, spec.max_model_len)
        self._held: dict[Attempt, Sequence] = {}
        self._is_up = True
        self._is_busy = False
        self._life = 0  # how often it was lost; what an earlier life computed is dropped
        self._results_s = 0.0  # when the results of the latest step come
        self._totals = StepTotals(spec.cost)

    @property
    def max_model_len(self) -> int:
        return self._scheduler.max_model_len

    def submit(self, attempt: Attempt) -> None:
        """Queue it."""
        sequence = CountedSequence(attempt, attempt.request, self._agenda.now_s)
        if self._names is not None and self.spec.prefix_cache:
            sequence.block_hashes = self._names.of(attempt.row, attempt.request.max_total_tokens)
        try:
            self._scheduler.add(sequence)
        except TandemError as error:
            self._listener.failed(attempt, self.spec.instance_id, error)
        if not self._is_busy:
            self._step()

    def release(self, attempt: Attempt) -> None:
        """Give up the attempt in whatever phase it is; a finished one's blocks are no longer needed."""
        if (sequence := self._held.pop(attempt, None)) is not None:
            self._scheduler.release(sequence)
        else:
            self._scheduler.cancel(attempt)
        if self._is_up and not self._is_busy and len(self._scheduler) > 0:
            self._step()

    def fail(self) -> None:
        """What it computes is lost; the router takes its attempts off it."""
        self._is_up = self._is_busy = False
        self._life += 1
        self._results_s = 0.0
        self._index.clear()

    def restart(self) -> None:
        self._is_up = True

    def use(self) -> InstanceUse:
        cached_tokens = self._scheduler.counts().cached_tokens
        return self._totals.use(self.spec, cached_tokens=cached_tokens, preemptions=0, peak_blocks=self._pool.peak_held)

    def check_idle(self) -> None:
        """Assert that nothing is left of any request."""
        assert len(self._scheduler) == 0
        assert not self._held
        assert self._pool.num_held == 0

    def _step(self) -> None:
        now_s = self._agenda.now_s
        chunks = self._scheduler.next_batch(now_s)
        self._is_busy = bool(chunks)
        if not chunks:
            return
        for chunk in chunks:
            if chunk.start == chunk.sequence.num_cached:
                self._listener.prefill_started(_attempt(chunk), chunk.sequence.num_cached)
        cost = self._totals.count_step(_load(chunks))
        cold_s = self.spec.cold_step_factor * cost.total_s if now_s - self._results_s > PAUSE_S else 0.0
        self._totals.count_more(cold_s)
        self._results_s = max(self._results_s, now_s + cold_s + cost.total_s)
        step = (chunks, self._life)
        if cost.interval_s < cost.total_s:
            self._agenda.at_step_end(now_s + cold_s + cost.interval_s, self._next_step, step)
            self._agenda.at_step_end(self._results_s, self._end_pipeline, step)
        else:
            self._agenda.at_step_end(self._results_s, self._end_step, step)

    def _next_step(self, step: tuple[list[PrefillChunk], int]) -> None:
        """The first stage is free. What follows in order finds the KV of these chunks, so the scheduler may go on."""
        chunks, life = step
        if life == self._life:
            self._computed(chunks)
            self._step()

    def _end_pipeline(self, step: tuple[list[PrefillChunk], int]) -> None:
        chunks, life = step
        if life == self._life:
            self._hand_over(chunks)

    def _end_step(self, step: tuple[list[PrefillChunk], int]) -> None:
        chunks, life = step
        if life == self._life:
            self._computed(chunks)
            self._hand_over(chunks)
            self._step()

    def _computed(self, chunks: list[PrefillChunk]) -> None:
        for chunk in chunks:
            if self._scheduler.computed(chunk) and chunk.is_last:
                self._held[_attempt(chunk)] = chunk.sequence

    def _hand_over(self, chunks: list[PrefillChunk]) -> None:
        for chunk in chunks:
            attempt = _attempt(chunk)
            if chunk.is_last and attempt in self._held:
                assert chunk.sequence.started_s is not None, "what is finished was started"
                self._listener.prefill_finished(attempt, chunk.sequence.started_s)


def _attempt(chunk: PrefillChunk) -> Attempt:
    key = chunk.sequence.key
    assert isinstance(key, Attempt)
    return key


def _load(chunks: list[PrefillChunk]) -> StepLoad:
    return load_of(chunks, sampled=sum(chunk.is_last for chunk in chunks))
