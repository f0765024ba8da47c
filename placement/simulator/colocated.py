"""An instance that serves both phases on one device: the baseline that disaggregation is judged against."""

from tandem.core.cost_model import StepLoad
from tandem.core.errors import TandemError
from tandem.placement.simulator.agenda import Agenda
from tandem.placement.simulator.attempt import Attempt, Listener
from tandem.placement.simulator.counted import CountedSequence
from tandem.placement.simulator.deployment import InstanceSpec
from tandem.placement.simulator.load import load_of
from tandem.placement.simulator.prefixes import BlockNames, pool_and_index
from tandem.placement.simulator.result import InstanceUse
from tandem.placement.simulator.stepping import SteppingInstance, attempt_of
from tandem.scheduling.colocated import ColocatedChunk, ColocatedPolicy, ColocatedScheduler
from tandem.scheduling.sequence import Sequence


class ColocatedInstance(SteppingInstance):
    """`submit` an attempt; every token is its doing."""

    def __init__(
        self,
        spec: InstanceSpec,
        agenda: Agenda,
        listener: Listener,
        names: BlockNames | None = None,
        *,
        step_by_step: bool = False,
    ) -> None:
        self._pool, self._index = pool_and_index(spec, names)
        self._names = names
        policy = ColocatedPolicy(
            max_batch=spec.max_batch,
            max_queue=spec.max_queue,
            max_batch_tokens=spec.max_batch_tokens,
            mixing=spec.policy,
            growth_horizon_tokens=spec.growth_horizon_tokens,
        )
        self._scheduler = ColocatedScheduler(policy, self._pool, self._index, spec.max_model_len)
        super().__init__(spec, self._scheduler, agenda, listener, step_by_step=step_by_step)

    def submit(self, attempt: Attempt) -> None:
        """Queue it."""
        if self._scheduler.has_waiting:
            self._submit(attempt)  # behind others, for whom the next step's end changes nothing
        else:
            self._command(self._submit, attempt)

    def fail(self) -> None:
        super().fail()
        self._index.clear()

    def use(self) -> InstanceUse:
        counts = self._scheduler.counts()
        return self._totals.use(
            self.spec,
            cached_tokens=counts.cached_tokens,
            preemptions=counts.preemptions,
            peak_blocks=self._pool.peak_held,
        )

    def check_idle(self) -> None:
        """Assert that nothing is left of any request."""
        assert len(self._scheduler) == 0
        assert self._pool.num_held == 0

    def _submit(self, attempt: Attempt) -> None:
        sequence = CountedSequence(attempt, attempt.request, self._agenda.now_s)
        if self._names is not None and self.spec.prefix_cache:
            sequence.block_hashes = self._names.of(attempt.row, attempt.request.max_total_tokens)
        try:
            self._scheduler.add(sequence)
        except TandemError as error:
            self._listener.failed(attempt, self.spec.instance_id, error)

    def _admit(self) -> None:
        """The next batch takes newcomers in."""

    def _compute(self) -> tuple[list[ColocatedChunk], float]:
        chunks = self._scheduler.next_batch(self._agenda.now_s)
        for chunk in chunks:
            if chunk.is_prompt and chunk.start == chunk.sequence.num_cached:
                self._listener.prefill_started(attempt_of(chunk.sequence), chunk.sequence.num_cached)
        return chunks, self._totals.count_step(self._load(chunks)).total_s if chunks else 0.0

    def _load(self, chunks: list[ColocatedChunk]) -> StepLoad:
        """What the step computes, padding included."""
        prompts = [chunk for chunk in chunks if chunk.is_prompt]
        if prompts and self.spec.policy == "padded":
            longest = max(chunk.num_tokens for chunk in prompts)
            return StepLoad.of_prompts(*[longest] * len(prompts))
        decoding = [chunk for chunk in chunks if not chunk.is_prompt]
        return load_of(prompts, decoding, sampled=sum(chunk.samples for chunk in chunks))

    def _computed(self, chunks: list[ColocatedChunk]) -> None:
        for chunk in chunks:
            if not self._scheduler.computed(chunk) or not chunk.samples:
                continue
            sequence = self._scheduler.generated(chunk.sequence.key, 0)
            self._tell(sequence)
            self._finish_if_long_enough(sequence)

    def _tell(self, sequence: Sequence) -> None:
        num_new = sequence.num_tokens - len(sequence.request.token_ids)
        if num_new == 1:
            assert sequence.started_s is not None, "what was computed was started"
            self._listener.prefill_finished(attempt_of(sequence), sequence.started_s)
        elif num_new == 2:
            self._listener.second_token(attempt_of(sequence), self._began_s, self._agenda.now_s)
