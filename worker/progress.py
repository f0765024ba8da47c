"""Whether an instance makes progress: the age of the step in progress, and the limit of that age.

    loop thread     begin(size), ..., end()     StepProgress     measures the longest recent step of each size
    event loop      look(), every LOOK_EVERY_S  StallDetector    age of the step in progress -> stalled -> hung

A step is *stalled* when its age exceeds its limit: the instance then takes no requests, and the router moves those that
it has to other instances. A step is *hung* when its age exceeds ten limits and ten seconds: the process then ends, so
that it is replaced. When a stalled step ends, the instance is READY again.

The limit of a step, so that slow but healthy steps of a big model are not taken for stalled ones:

- ten times the longest recent step of its size or of a smaller one, and at least one second;
- for a size that the instance has not computed yet, though it has computed a larger one: as if it had that size;
- for a larger size than all that it has computed (the first steps after the load, or the first long prompt, for which
  kernels may be compiled and memory allocated): the time of the largest computed size in proportion, and at least ten
  seconds. This is an upper bound, because a small step takes longer per token.

The size of a step counts its tokens, and one more for each 1,024 attention pairs. Sizes that differ by less than a
factor of two count as equal. Other work of the loop thread (commands, scheduling, self-checks) is a step of size 0.
"""

from dataclasses import dataclass

from tandem.core.clock import Clock

LOOK_EVERY_S = 0.1
LATE_LOOK_S = 0.5  # time that a late look adds to the age of a step, at most
MIN_LIMIT_S = 1.0
FIRST_LIMIT_S = 10.0  # of a step larger than all before it, at least
LIMIT_FACTOR = 10.0
HUNG_FACTOR = 10.0
MIN_HUNG_S = 10.0
PAIRS_PER_TOKEN = 1024

_NUM_SIZES = 64  # powers of two
_DECAY = 0.95  # of the longest step, with each later step of that size


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A step in progress."""

    begun_s: float
    limit_s: float
    size_class: int


class StepProgress:
    """The loop thread calls `begin` and `end`; any thread may read `step`. O(1)."""

    def __init__(self, clock: Clock) -> None:
        self.step: Step | None = None
        self._clock = clock
        self._longest_s = [0.0] * _NUM_SIZES  # by size class; 0: no such step was computed
        self._largest = -1  # the largest size class that was computed

    def begin(self, size: int) -> None:
        """A step of that size begins; the previous one, if any, has ended."""
        now_s = self._clock.now_s()
        if self.step is not None:
            self._measured(self.step, now_s)
        self.step = Step(now_s, self.limit_s(size), size.bit_length())

    def end(self) -> None:
        """The step has ended; the loop thread waits for commands."""
        if self.step is not None:
            self._measured(self.step, self._clock.now_s())
            self.step = None

    def limit_s(self, size: int) -> float:
        """How old a step of that size may become."""
        longest_s, largest, size_class = self._longest_s, self._largest, size.bit_length()
        if size_class > largest:
            proportional_s = longest_s[largest] * 2.0 ** (size_class - largest) if largest > 0 else 0.0
            return max(FIRST_LIMIT_S, proportional_s)
        known = size_class
        while longest_s[known] == 0.0:
            known += 1
        return max(MIN_LIMIT_S, LIMIT_FACTOR * max(longest_s[: known + 1]))

    def _measured(self, step: Step, now_s: float) -> None:
        """A step that took longer than its limit counts as the limit: perhaps the whole process was stopped."""
        step_s = min(now_s - step.begun_s, step.limit_s)
        self._longest_s[step.size_class] = max(_DECAY * self._longest_s[step.size_class], step_s, 1e-6)
        self._largest = max(self._largest, step.size_class)


class StallDetector:
    """Used on the event loop, by one task that calls `look` every `LOOK_EVERY_S`.

    When `look` is called late, the whole process was stopped or had no core. That is not the step's fault, so at most
    `LATE_LOOK_S` of the time counts.
    """

    def __init__(self, progress: StepProgress, clock: Clock) -> None:
        self.age_s = 0.0  # of the step in progress; 0 between two steps
        self._progress = progress
        self._clock = clock
        self._step: Step | None = None
        self._looked_s = clock.now_s()

    @property
    def is_stalled(self) -> bool:
        return self._step is not None and self.age_s > self._step.limit_s

    @property
    def is_hung(self) -> bool:
        return self._step is not None and self.age_s > max(MIN_HUNG_S, HUNG_FACTOR * self._step.limit_s)

    def look(self) -> None:
        """Update `age_s` from the step in progress."""
        now_s, step = self._clock.now_s(), self._progress.step
        before_s = self._looked_s
        self._looked_s = now_s
        if step is not self._step:
            self._step, self.age_s = step, 0.0
        if step is not None:
            self.age_s += min(now_s - max(before_s, step.begun_s), LATE_LOOK_S)
