"""Totals of an instance's steps."""

from operator import attrgetter

from tandem.core.cost_model import COST_TERMS, CostModel, StepCost, StepLoad
from tandem.placement.simulator.deployment import InstanceSpec
from tandem.placement.simulator.fast_run import ChunkRun, FastRun
from tandem.placement.simulator.result import InstanceUse

_terms_of = attrgetter(*COST_TERMS)


class StepTotals:
    """Counts steps as they begin, and says at the end what they spent their time on."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._terms_s = [0.0] * len(COST_TERMS)
        # By batch size, of runs: steps and tokens of KV read. A step's cost is affine in the latter, so their terms'
        # totals are those of as many steps that read as much in all, equally.
        self._run_steps: dict[int, int] = {}
        self._run_kv_tokens: dict[int, int] = {}
        self._more_s = 0.0
        self._steps = 0
        self._busy_s = 0.0
        self._prefill_tokens = 0
        self._decode_tokens = 0

    def count_step(self, load: StepLoad) -> StepCost:
        """What the step costs."""
        cost = self._cost.step(load)
        self.count_one_step(load, cost, cost.interval_s if cost.interval_s > 0 else cost.total_s)
        return cost

    def count_one_step(self, load: StepLoad, cost: StepCost, busy_s: float) -> None:
        """`busy_s`: the time of the step in which no other counts."""
        self._count(cost, busy_s)
        self._prefill_tokens += load.prefill_tokens
        self._decode_tokens += load.decode_sequences

    def count_more(self, seconds: float) -> None:
        """What a step takes that its cost does not know of."""
        self._more_s += seconds
        self._busy_s += seconds

    def count_run(self, run: FastRun) -> None:
        steps, sequences = run.num_steps, run.steps.num_sequences
        self._steps += steps
        self._decode_tokens += steps * sequences
        self._busy_s += run.end_of(steps) - run.began_s
        self._more_s += run.late_s
        kv_tokens = steps * run.steps.kv_tokens + steps * (steps - 1) // 2 * sequences
        self._run_steps[sequences] = self._run_steps.get(sequences, 0) + steps
        self._run_kv_tokens[sequences] = self._run_kv_tokens.get(sequences, 0) + kv_tokens

    def count_chunks(self, run: ChunkRun) -> None:
        for cost in run.costs[: run.num_steps]:
            self._count(cost, cost.interval_s if cost.interval_s > 0 else cost.total_s)
        self._prefill_tokens += run.num_steps * run.chunks.num_tokens
        if run.chunks.beside is not None:
            self._decode_tokens += run.num_steps * run.chunks.beside.num_sequences
        self.count_more(run.late_s)

    def use(self, spec: InstanceSpec, *, cached_tokens: int, preemptions: int, peak_blocks: int) -> InstanceUse:
        return InstanceUse(
            instance_id=spec.instance_id,
            role=spec.role,
            steps=self._steps,
            busy_s=self._busy_s,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            cached_tokens=cached_tokens,
            preemptions=preemptions,
            peak_blocks=peak_blocks,
            num_blocks=spec.num_blocks,
            cost_terms_s=self._cost_terms_s(),
        )

    def _cost_terms_s(self) -> dict[str, float]:
        """Seconds by the names of `StepCost.terms`; runs' are added now."""
        for sequences, steps in self._run_steps.items():
            kv_tokens, rest = divmod(self._run_kv_tokens[sequences], steps)
            self._add(self._cost.step(StepLoad.of_decode(sequences, kv_tokens)), steps - rest)
            self._add(self._cost.step(StepLoad.of_decode(sequences, kv_tokens + 1)), rest)
        self._run_steps.clear()
        self._run_kv_tokens.clear()
        if self._steps == 0 and self._more_s == 0.0:
            return {}
        terms_s = dict(zip(COST_TERMS, self._terms_s, strict=True))
        return terms_s | {"overhead_s": terms_s["overhead_s"] + self._more_s}

    def _count(self, cost: StepCost, busy_s: float) -> None:
        self._add(cost, 1)
        self._steps += 1
        self._busy_s += busy_s

    def _add(self, cost: StepCost, steps: int) -> None:
        self._terms_s = [total + steps * term for total, term in zip(self._terms_s, _terms_of(cost), strict=True)]
