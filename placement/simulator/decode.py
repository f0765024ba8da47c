"""A decode instance: `decode_worker.loop` with a cost model in the engine's place."""

from tandem.core.cost_model import StepLoad
from tandem.core.errors import TandemError
from tandem.placement.simulator.agenda import Agenda
from tandem.placement.simulator.attempt import Attempt, Listener
from tandem.placement.simulator.counted import CountedPool, CountedSequence
from tandem.placement.simulator.deployment import InstanceSpec
from tandem.placement.simulator.load import load_of
from tandem.placement.simulator.result import InstanceUse
from tandem.placement.simulator.stepping import SteppingInstance, attempt_of
from tandem.scheduling.decode import DecodeChunk, DecodePolicy
from tandem.scheduling.steady_decode import SteadyDecodeScheduler


class DecodeInstance(SteppingInstance):
    """`open` an attempt, and say when its KV has `arrived`."""

    def __init__(self, spec: InstanceSpec, agenda: Agenda, listener: Listener, *, step_by_step: bool = False) -> None:
        self._pool = CountedPool(spec.num_blocks)
        policy = DecodePolicy(spec.max_batch, spec.max_queue, spec.growth_horizon_tokens)
        self._scheduler = SteadyDecodeScheduler(policy, self._pool, spec.block_size, spec.max_model_len)
        super().__init__(spec, self._scheduler, agenda, listener, step_by_step=step_by_step)

    def open(self, attempt: Attempt) -> None:
        """Queue it for a reservation."""
        if self._scheduler.has_waiting and self.spec.request_admission_cost_s == 0:
            self._open(attempt)  # behind others, for whom the next step's end changes nothing
        else:
            self._command(self._open, attempt, self.spec.request_admission_cost_s)

    def arrived(self, attempt: Attempt) -> None:
        """Its KV is here."""
        self._command(self._arrived, attempt)

    def use(self) -> InstanceUse:
        counts = self._scheduler.counts()
        return self._totals.use(
            self.spec, cached_tokens=0, preemptions=counts.preemptions, peak_blocks=self._pool.peak_held
        )

    def check_idle(self) -> None:
        """Assert that nothing is left of any request."""
        assert len(self._scheduler) == 0
        assert self._pool.num_held == 0

    def _open(self, attempt: Attempt) -> None:
        try:
            self._scheduler.add(CountedSequence(attempt, attempt.request, self._agenda.now_s))
        except TandemError as error:
            self._listener.failed(attempt, self.spec.instance_id, error)

    def _arrived(self, attempt: Attempt) -> None:
        if self._scheduler.get(attempt) is not None:
            self._scheduler.committed(attempt, 0, self._agenda.now_s)
            self._listener.transfer_committed(attempt)

    def _admit(self) -> None:
        for sequence in self._scheduler.reserve(self._agenda.now_s):
            self._listener.decode_reserved(attempt_of(sequence))

    def _compute(self) -> tuple[list[DecodeChunk], float]:
        chunks = self._scheduler.next_batch(self._agenda.now_s)
        if not chunks:
            return chunks, 0.0
        return chunks, self._totals.count_step(_load(chunks)).total_s

    def _computed(self, chunks: list[DecodeChunk]) -> None:
        for chunk in chunks:
            if not self._scheduler.computed(chunk) or not chunk.samples:
                continue
            is_first = chunk.sequence.num_tokens == len(chunk.sequence.request.token_ids) + 1
            sequence = self._scheduler.generated(chunk.sequence.key, 0)
            if is_first:
                assert sequence.started_s is not None, "what was computed was started"
                self._listener.second_token(attempt_of(sequence), sequence.started_s, self._agenda.now_s)
            self._finish_if_long_enough(sequence)


def _load(chunks: list[DecodeChunk]) -> StepLoad:
    """Sequences that are recomputed count as prompts."""
    again = [chunk for chunk in chunks if chunk.num_tokens > 1]
    steady = [chunk for chunk in chunks if chunk.num_tokens == 1]
    return load_of(again, steady, sampled=sum(chunk.samples for chunk in chunks))
