"""A simulated instance of several pipeline stages, whose cost model knows single steps."""

from collections import deque
from dataclasses import dataclass

from tandem.core.cost_model import staged
from tandem.placement.simulator.attempt import Listener
from tandem.placement.simulator.deployment import InstanceSpec
from tandem.placement.simulator.event_queue import EventQueue
from tandem.placement.simulator.fast_run import ChunkRun, ChunkStep, FastRun
from tandem.placement.simulator.instance import SimulatedInstance
from tandem.placement.simulator.prefixes import BlockNames
from tandem.scheduling.chunk import Chunk


def simulated_instance(
    spec: InstanceSpec, events: EventQueue, listener: Listener, names: BlockNames | None, *, step_by_step: bool
) -> SimulatedInstance:
    """Of the class that the instance's costs ask for."""
    kind = SimulatedInstance if staged(spec.cost) is None else StagedInstance
    return kind(spec, events, listener, names, step_by_step=step_by_step)


@dataclass(frozen=True, slots=True)
class _StepUnderWay:
    """It began at `began_s`, and its results come at `results_s`."""

    chunks: list[Chunk]
    began_s: float
    results_s: float


class StagedInstance(SimulatedInstance):
    """As `worker.loop` and `worker.step_pipeline` do it, up to as many steps are under way as there are stages:

        first stage    launch 1 | launch 2 |  ...   | launch 3 | ...
        second stage            |  step 1  | step 2 |    ...   | step 3
        loop                                collect 1   collect 2

    A step begins when the one before has left the first stage. When as many are under way as there are stages, or there
    is nothing to begin, the oldest is collected, and what came meanwhile waits for that. In the last stage a step takes
    the place of the one before, so its results come an interval later at the earliest. While few sequences decode, and
    nothing else, they are in one step at a time, and their steps are one event.
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
        super().__init__(spec, events, listener, names, step_by_step=step_by_step)
        cost = staged(spec.cost)
        assert cost is not None, "a `SimulatedInstance` has one step at a time"
        self._cost = cost
        self._under_way: deque[_StepUnderWay] = deque()  # oldest first

    def fail(self) -> None:
        while self._under_way:  # so that their blocks are free once their sequences are taken off
            self._results.computed(self._under_way.popleft().chunks)
        super().fail()

    def _cut(self, run: FastRun | ChunkRun, late_s: float) -> None:
        """The step under way becomes one beside which another may begin."""
        assert isinstance(run, FastRun), "chunks are steps of their own"
        now_s = self._events.now_s
        run.cut_before(now_s)
        if run.num_steps:
            self._results_s = run.end_s
            self._take_run(run, run.num_steps)
        free_s = self._launch(self._scheduler.next_batch(run.end_s), run.end_s)
        self._late_s += late_s
        self._wait(free_s, collects=now_s > free_s)

    def _begin(self, now_s: float) -> None:
        if not self._under_way and not self._step_by_step and (steps := self._scheduler.fast_forward()) is not None:
            self._begin_run(FastRun(steps, self._cost.decode_coefficients(steps.num_sequences), now_s))
            return
        chunks = self._scheduler.next_batch(now_s)
        free_s = self._launch(chunks, now_s) if chunks else now_s
        if self._under_way:
            self._wait(free_s, collects=not chunks or len(self._under_way) == self._cost.num_stages)

    def _wait(self, free_s: float, *, collects: bool) -> None:
        """Until the first stage is free, or also until the oldest step is collected."""
        oldest = self._under_way[0]
        self._step = step = ChunkStep(oldest.chunks)
        until_s = max(free_s, oldest.results_s) if collects else free_s
        self._events.at_step_end(until_s, self._end_turn, (step, collects))

    def _launch(self, chunks: list[Chunk], now_s: float) -> float:
        """When the first stage is free again."""
        self._step = ChunkStep(chunks)
        self._tell_started(chunks)
        load = self.spec.load_of(chunks)
        cost = self._cost.one_step(load)
        cold_s = self.spec.cold_step_factor * cost.total_s if self._is_cold else 0.0
        free_s = now_s + cold_s + cost.interval_s
        results_s = max(now_s + cold_s + cost.total_s, self._results_s + cost.interval_s)
        self._totals.count_one_step(load, cost, results_s - max(now_s, self._results_s) - cold_s)
        self._totals.count_more(cold_s)
        self._results_s = results_s
        self._scheduler.launched(chunks)
        self._under_way.append(_StepUnderWay(chunks, now_s, results_s))
        return free_s

    def _end_turn(self, turn: tuple[ChunkStep, bool]) -> None:
        step, collects = turn
        if self._step is not step:
            return  # lost with the instance
        if (late_s := self._take_late_s()) > 0:
            self._events.at_step_end(self._events.now_s + late_s, self._end_turn, turn)
            return
        if collects:
            self._collect()
        self._turn()

    def _collect(self) -> None:
        """The results of the oldest step under way."""
        if self._predictor is not None:
            together = [chunk for each in self._under_way for chunk in each.chunks]
            self._predictor.observe(self.spec.load_of(together), self._events.now_s - self._under_way[0].began_s)
        step = self._under_way.popleft()
        self._results.computed(step.chunks)
        self._results.drawn(step.chunks, step.began_s)
