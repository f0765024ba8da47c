"""A simulated instance: `worker.loop` with a cost model in the engine's place."""

from collections.abc import Callable
from functools import partial
from typing import cast

from tandem.core.cost_model import staged
from tandem.core.errors import TandemError
from tandem.core.session import Role
from tandem.placement.simulator.attempt import Listener, SimulatedAttempt
from tandem.placement.simulator.counted import CountedSequence
from tandem.placement.simulator.deployment import PAUSE_S, InstanceSpec
from tandem.placement.simulator.event_queue import EventQueue
from tandem.placement.simulator.fast_run import ChunkRun, ChunkStep, FastRun
from tandem.placement.simulator.held_kv import SimulatedHeldKv
from tandem.placement.simulator.prefixes import BlockNames, pool_and_index
from tandem.placement.simulator.result import InstanceUse
from tandem.placement.simulator.step_results import StepResults, attempt_of
from tandem.placement.simulator.use import StepTotals
from tandem.scheduling.budget import role_budget
from tandem.scheduling.chunk import Chunk
from tandem.scheduling.fast_forward import FastForward
from tandem.scheduling.fast_forward_scheduler import FastForwardScheduler
from tandem.scheduling.predictor import StepPredictor
from tandem.scheduling.sequence import SequenceState
from tandem.scheduling.step_load import step_load

_Step = ChunkStep | FastRun | ChunkRun


class SimulatedInstance:
    """`submit` an attempt, and say when KV that comes from elsewhere has `arrived`; `release` gives an attempt up in
    any phase, and frees KV that was held for another instance.

    Commands that come during a step are applied when it ends, as live. While the batch stays the same its steps are
    one event, and so are the chunks of a prompt that leaves nothing of the budget to others; a command cuts such a run
    short, at the end of the step that is under way, unless it would change nothing there. `step_by_step` does without
    runs: slow, and the reference for them. Through a pipeline a step of prompts that are handed over may begin while
    earlier ones are still under way; their results come in order. (A `StagedInstance` has the costs of single steps,
    and has any steps under way at once.)
    """

    def __init__(
        self,
        spec: InstanceSpec,
        events: EventQueue,
        listener: Listener,
        names: BlockNames | None = None,
        *,
        step_by_step: bool = False,
    ) -> None:
        """`names`, if prompts share prefixes; only an instance that caches prefixes looks at them."""
        self.spec = spec
        self._events = events
        self._listener = listener
        self._step_by_step = step_by_step
        # Other systems have schedulers and costs of their own, which want to see each sequence.
        own_rules = spec.scheduler_type is FastForwardScheduler and spec.load_of is step_load
        self._mixes_fast = own_rules and not step_by_step
        self._names = names if spec.prefix_cache and spec.role != "decode" else None
        self._pool, self._index = pool_and_index(spec, self._names)
        budget = role_budget(
            Role(spec.role),
            max_batch=spec.max_batch,
            max_queue=spec.max_queue,
            max_batch_tokens=None if spec.role == "decode" else spec.max_batch_tokens,
            max_prefill_tokens=spec.max_prefill_tokens,
            mixing=spec.policy,
            growth_horizon_tokens=spec.growth_horizon_tokens,
        )
        self._predictor: StepPredictor | None = None
        if spec.policy == "slack" and spec.step_cost is not None:
            self._predictor = StepPredictor(spec.step_cost)
        known = staged(spec.cost)
        num_stages = 1 if known is None else known.num_stages
        self._scheduler = spec.scheduler_type(
            budget, self._pool, self._index, spec.max_model_len, self._predictor, num_stages
        )
        self._held = SimulatedHeldKv(spec.lease_s, events, self._lease_ended)
        self._results = StepResults(self._scheduler, self._held, listener, events)
        self._commands: list[tuple[Callable[[], None], bool]] = []  # and whether it is a release
        self._is_up = True
        self._life = 0  # how often it was lost; what an earlier life computed is dropped
        self._step: _Step | None = None  # what is computed now
        self._is_between = False  # two steps: a command that comes now is applied before the next begins
        self._began_s = 0.0  # when the step began
        self._late_s = 0.0  # how much longer the step takes for the commands that came during it
        self._results_s = 0.0  # when the results of the latest step come
        self._totals = StepTotals(spec.cost)

    @property
    def max_model_len(self) -> int:
        return self._scheduler.max_model_len

    @property
    def step_prompt_tokens(self) -> int:
        return self._scheduler.budget.max_prefill_tokens

    # --- commands ----------------------------------------------------------------------------------------------------

    def submit(self, attempt: SimulatedAttempt, *, is_remote: bool = False, hand_over: bool = False) -> None:
        """Queue it: to compute its prompt, or to receive its KV (`is_remote`)."""
        submit = partial(self._submit, attempt, is_remote, hand_over)
        late_s = self.spec.request_admission_cost_s if is_remote else 0.0
        must_wait = self._scheduler.has_waiting_before(is_remote=is_remote)
        if self._is_up and late_s == 0 and must_wait and self._step is not None:
            submit()  # behind others, for whom the next step's end changes nothing
        else:
            self._command(submit, late_s, is_prompt=not is_remote)

    def arrived(self, attempt: SimulatedAttempt) -> None:
        """Its KV is here."""
        self._command(partial(self._arrived, attempt))

    def release(self, attempt: SimulatedAttempt) -> None:
        """Give it up in any phase; KV that was held for another instance is no longer needed. Its lease ends at once,
        its blocks are free after the step."""
        self._held.end_lease(attempt)
        is_held = self._held.get(attempt) is not None
        self._command(partial(self._release, attempt), is_release=True, is_held=is_held)

    def renew_lease(self, attempt: SimulatedAttempt) -> None:
        self._held.renew_lease(attempt)

    def fail(self) -> None:
        """What it computes is lost; the router takes its attempts off it, one `release` after the other."""
        if isinstance(self._step, FastRun | ChunkRun):
            self._step.cut(self._events.now_s)
            self._take_run(self._step, self._step.num_steps - 1)  # without the one under way
        self._totals.count_more(self._late_s)
        self._late_s = self._results_s = 0.0
        self._is_up = False
        self._life += 1
        self._step = None
        commands, self._commands = self._commands, []
        for apply, is_release in commands:
            if is_release:  # the router has taken that attempt off already
                apply()
        self._held.lose_leases()
        self._index.clear()

    def restart(self) -> None:
        self._is_up = True

    # --- for the result ----------------------------------------------------------------------------------------------

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
        assert len(self._held) == 0
        assert self._pool.num_held == 0

    # --- between two steps -------------------------------------------------------------------------------------------

    def _command(
        self,
        apply: Callable[[], None],
        late_s: float = 0.0,
        *,
        is_prompt: bool = False,
        is_release: bool = False,
        is_held: bool = False,
    ) -> None:
        """`late_s`: how much longer a step takes during which it comes. `is_prompt`: a prompt to compute comes.
        `is_held`: what is released is held for another instance."""
        if not self._is_up:
            apply()
            return
        self._commands.append((apply, is_release))
        if self._is_between:
            return
        step = self._step
        if step is None:
            self._turn()
        elif isinstance(step, ChunkStep):
            self._late_s += late_s
        elif isinstance(step, ChunkRun) and (is_prompt or (is_held and self._has_memory_for(step))):
            pass  # the first prompt has the whole budget until the run ends
        else:
            self._cut(step, late_s)

    def _cut(self, run: FastRun | ChunkRun, late_s: float) -> None:
        """A command has come during the run."""
        if run.cut(self._events.now_s, late_s):
            self._events.at_step_end(run.end_s, self._end_run, run)

    def _has_memory_for(self, run: ChunkRun) -> bool:
        """Whether more memory changes nothing before the run ends: nothing grows, and nobody waits to arrive."""
        return run.chunks.beside is None and not self._scheduler.has_unreserved

    def _submit(self, attempt: SimulatedAttempt, is_remote: bool, hand_over: bool) -> None:
        sequence = CountedSequence(attempt, attempt.request, self._events.now_s, is_remote, hand_over)
        if self._names is not None:
            sequence.block_hashes = cast(list[bytes], self._names.path(attempt.row))  # see `prefix_runs.RunIndex`
        try:
            self._scheduler.add(sequence)
        except TandemError as error:
            self._listener.failed(attempt, self.spec.instance_id, error)

    def _arrived(self, attempt: SimulatedAttempt) -> None:
        if self._scheduler.get(attempt) is not None:
            self._scheduler.committed(attempt, 0, self._events.now_s)
            self._listener.transfer_committed(attempt)

    def _release(self, attempt: SimulatedAttempt) -> None:
        if (held := self._held.pop(attempt)) is not None:
            self._scheduler.release(held)
        elif (sequence := self._scheduler.get(attempt)) is not None:
            if sequence.state in (SequenceState.RUNNING, SequenceState.PREEMPTED):
                attempt.num_handed_on = max(attempt.num_handed_on, sequence.num_generated)
            self._scheduler.cancel(attempt)

    def _turn(self) -> None:
        """What happens between two steps, and the beginning of the next."""
        now_s = self._events.now_s
        self._step = None
        self._began_s = now_s
        scheduler = self._scheduler
        self._is_between = True
        while True:
            commands, self._commands = self._commands, []
            for apply, _ in commands:
                apply()
            for sequence in scheduler.reserve():
                self._listener.decode_reserved(attempt_of(sequence))
            if not self._commands:  # what the router is told may have it send something
                break
        self._is_between = False
        self._begin(now_s)

    def _begin(self, now_s: float) -> None:
        """The next step, or the next steps together, if there is anything to compute."""
        scheduler = self._scheduler
        steps = None if self._step_by_step else scheduler.fast_forward()
        if steps is not None:
            coefficients = self.spec.cost.decode_coefficients(steps.num_sequences)
            self._begin_run(FastRun(steps, coefficients, now_s))
        elif self._mixes_fast and not self._is_cold and (full := scheduler.full_chunks()) is not None:
            self._begin_run(ChunkRun(full, self.spec.cost, now_s))
        elif self._mixes_fast and (mixed := scheduler.mixed_step(now_s)) is not None:
            self._begin_step(ChunkStep(*mixed))
        elif chunks := scheduler.next_batch(now_s):
            self._begin_step(ChunkStep(chunks))

    @property
    def _is_cold(self) -> bool:
        """Whether a step that begins now takes longer, after a pause."""
        return self.spec.cold_step_factor > 0 and self._events.now_s - self._results_s > PAUSE_S

    # --- steps -------------------------------------------------------------------------------------------------------

    def _begin_run(self, run: FastRun | ChunkRun) -> None:
        self._step = run
        self._events.at_step_end(run.end_s, self._end_run, run)

    def _tell_started(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.begins_prefill:
                self._listener.prefill_started(attempt_of(sequence), sequence.num_cached)

    def _begin_step(self, step: ChunkStep) -> None:
        now_s = self._events.now_s
        self._step, chunks, beside = step, *step
        self._tell_started(chunks)
        load = self.spec.load_of(chunks)
        if beside is not None:
            load = load.beside_decode(beside.num_sequences, beside.kv_tokens)
        cost = self._totals.count_step(load)
        if self._predictor is not None:
            self._predictor.observe(load, cost.total_s)
        cold_s = 0.0
        if self._is_cold:
            cold_s = self.spec.cold_step_factor * cost.total_s
            self._totals.count_more(cold_s)
        self._results_s = max(self._results_s, now_s + cold_s + cost.total_s)
        is_piped = cost.interval_s < cost.total_s and all(chunk.sequence.hand_over for chunk in chunks)
        if is_piped and beside is None:
            piped = (chunks, self._life)
            self._events.at_step_end(now_s + cold_s + cost.interval_s, self._next_step, piped)
            self._events.at_step_end(self._results_s, self._end_pipeline, piped)
        else:
            self._events.at_step_end(self._results_s, self._end_step, step)

    def _next_step(self, step: tuple[list[Chunk], int]) -> None:
        """The first stage is free. What follows in order finds the KV of these chunks, so the scheduler may go on."""
        chunks, life = step
        if life == self._life:
            self._results.computed(chunks)
            self._turn()

    def _end_pipeline(self, step: tuple[list[Chunk], int]) -> None:
        chunks, life = step
        if life == self._life:
            self._results.drawn(chunks, self._began_s)

    def _end_step(self, step: ChunkStep) -> None:
        if self._step is not step:
            return  # lost with the instance
        if (late_s := self._take_late_s()) > 0:
            self._results_s = self._events.now_s + late_s
            self._events.at_step_end(self._results_s, self._end_step, step)
            return
        self._results.computed(step.chunks)
        if step.beside is not None:
            self._results.decoded(step.beside, 1, self._began_s, self._events.now_s)
        self._results.drawn(step.chunks, self._began_s)
        self._turn()

    def _take_late_s(self) -> float:
        """How much longer the step takes for what came during it, told once."""
        late_s, self._late_s = self._late_s, 0.0
        self._totals.count_more(late_s)
        return late_s

    def _end_run(self, run: FastRun | ChunkRun) -> None:
        if self._step is not run or run.end_s != self._events.now_s:
            return  # lost with the instance, or cut short meanwhile
        self._results_s = max(self._results_s, run.results_s) if isinstance(run, ChunkRun) else run.end_s
        self._take_run(run, run.num_steps)
        self._turn()

    def _take_run(self, run: FastRun | ChunkRun, num_done: int) -> None:
        """So many of its steps are done."""
        if isinstance(run, FastRun):
            self._totals.count_run(run)
            decoding: FastForward | None = run.steps
        else:
            self._totals.count_chunks(run)
            decoding = run.chunks.beside
            if num_done > 0:
                self._results.computed([run.first(num_done)])
        if num_done > 0 and decoding is not None:
            self._results.decoded(decoding, num_done, run.began_s, run.end_of(1))

    def _lease_ended(self, attempt: SimulatedAttempt) -> None:
        self.release(attempt)
        self._listener.lease_ended(attempt)
