"""The state of an instance's loop, for heartbeats and for a drain that waits until the loop is idle."""

from dataclasses import dataclass

from tandem.core.session import BlockCounts
from tandem.core.step_coefficients import StepCoefficients
from tandem.engine.engine import Engine
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.integrity import count_blocks
from tandem.scheduling.scheduler import Scheduler
from tandem.worker.kept_blocks import KeptBlocks
from tandem.worker.step_pipeline import StepPipeline


@dataclass(frozen=True, slots=True)
class LoopReport:
    """State of the loop at one moment; never changed. Commands, steps and tokens are totals since the start.
    `is_empty`: there is no attempt, and no block is held for a reader or a transfer."""

    fingerprint: str
    weights_hash: str
    max_model_len: int
    block_size: int
    blocks: BlockCounts
    waiting_requests: int
    running_requests: int
    uncomputed_tokens: int
    unreserved_tokens: int
    steps: int
    step_s: float
    computed_tokens: int
    cached_tokens: int
    preemptions: int
    step_cost: StepCoefficients | None
    step_prompt_tokens: int
    num_commands: int
    is_empty: bool


def make_report(
    engine: Engine,
    scheduler: Scheduler,
    pool: BlockPool,
    kept: KeptBlocks,
    steps: StepPipeline,
    *,
    max_model_len: int,
    step_cost: StepCoefficients | None,
    num_commands: int,
) -> LoopReport:
    """The state of now."""
    counts = scheduler.counts()
    num_owned = scheduler.num_held_blocks + kept.num_references
    return LoopReport(
        fingerprint=engine.layout.fingerprint,
        weights_hash=engine.layout.weights_hash,
        max_model_len=max_model_len,
        block_size=engine.layout.block_size,
        blocks=count_blocks(pool, num_owned, kept.num_held),
        waiting_requests=counts.waiting + counts.unreserved,
        running_requests=counts.receiving + counts.prompts + counts.decoding + counts.preempted,
        uncomputed_tokens=counts.uncomputed_tokens,
        unreserved_tokens=counts.unreserved_tokens,
        steps=steps.num_steps,
        step_s=steps.busy_s,
        computed_tokens=counts.computed_tokens,
        cached_tokens=counts.cached_tokens,
        preemptions=counts.preemptions,
        step_cost=step_cost,
        step_prompt_tokens=scheduler.budget.max_prefill_tokens,
        num_commands=num_commands,
        is_empty=not (len(scheduler) or kept or steps),
    )
