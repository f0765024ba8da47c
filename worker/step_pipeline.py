"""The steps of an instance that are under way: launched, and not collected yet."""

from collections import deque
from dataclasses import dataclass

from tandem.core.clock import Clock
from tandem.engine.engine import Engine
from tandem.engine.models.base import LayerHook
from tandem.engine.step import StepHandle, StepOutput
from tandem.scheduling.chunk import Chunk
from tandem.scheduling.predictor import StepPredictor
from tandem.scheduling.step_load import step_load
from tandem.worker.loop_values import slice_of
from tandem.worker.progress import PAIRS_PER_TOKEN


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step under way. `size` is counted as in `worker.progress`; `launched_s` is the time of the launch."""

    chunks: list[Chunk]
    size: int
    launched_s: float
    handle: StepHandle


class StepPipeline:
    """At most as many steps as the instance has pipeline stages, so that each stage can compute another step:

        first stage    launch 1 | launch 2 |  ...   | launch 3 | ...
        second stage            |  step 1  | step 2 |    ...   | step 3
        caller                              collect 1   collect 2

    Totals since the start: `num_steps` have ended, and during `busy_s` seconds at least one step was under way.
    """

    def __init__(self, engine: Engine, clock: Clock, predictor: StepPredictor | None) -> None:
        """`predictor` learns from the measured step times."""
        self._engine = engine
        self._clock = clock
        self._predictor = predictor
        self._steps: deque[LaunchedStep] = deque()  # oldest first
        self._ended_s = 0.0  # end of the last step
        self.num_steps = 0
        self.busy_s = 0.0

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def is_full(self) -> bool:
        return len(self._steps) >= self._engine.num_stages

    @property
    def largest_size(self) -> int:
        """Size of the largest step under way; 0 without one."""
        return max((step.size for step in self._steps), default=0)

    def launch(self, chunks: list[Chunk], layer_computed: LayerHook | None) -> None:
        """Begin a step. Raises the errors of `Engine.launch`: the step has ended then, and earlier steps go on."""
        assert not self.is_full, "collect the oldest step first"
        launched_s = self._clock.now_s()
        try:
            handle = self._engine.launch([slice_of(chunk) for chunk in chunks], layer_computed)
        except BaseException:
            self._ended(launched_s)
            raise
        self._steps.append(LaunchedStep(chunks, step_size(chunks), launched_s, handle))

    def collect(self) -> tuple[LaunchedStep, StepOutput | Exception]:
        """Wait for the oldest step. Returns its output, or the RuntimeError or MemoryError of `Engine.collect`."""
        together = [chunk for step in self._steps for chunk in step.chunks]
        step = self._steps.popleft()
        output: StepOutput | Exception
        try:
            output = self._engine.collect(step.handle)
        except (RuntimeError, MemoryError) as error:
            output = error
        else:
            if self._predictor is not None:
                # The steps under way shared this time, so it is the time of one round of all their sequences.
                self._predictor.observe(step_load(together), self._clock.now_s() - step.launched_s)
        self._ended(step.launched_s)
        return step, output

    def _ended(self, launched_s: float) -> None:
        now_s = self._clock.now_s()
        self.num_steps += 1
        self.busy_s += now_s - max(launched_s, self._ended_s)
        self._ended_s = now_s


def step_size(chunks: list[Chunk]) -> int:
    """Size of a step, as `worker.progress` counts it."""
    tokens = sum(chunk.num_tokens for chunk in chunks)
    pairs = sum(chunk.num_tokens * (chunk.start + chunk.num_tokens) for chunk in chunks)
    return tokens + pairs // PAIRS_PER_TOKEN
