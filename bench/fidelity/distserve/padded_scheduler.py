"""vLLM 0.2.3 as DistServe measured it: steps of whole prompts, each computed at the length of the step's longest
one."""

from collections.abc import Sequence
from typing import Any

from tandem.core.cost_model import StepLoad
from tandem.scheduling.batch_composer import BatchComposer
from tandem.scheduling.chunk import Chunk, prompt_chunk
from tandem.scheduling.fast_forward_scheduler import FastForwardScheduler
from tandem.scheduling.step_load import step_load

MAX_PADDING_TOKENS = 256


class PaddedComposer(BatchComposer):
    """As `prompt_first`, but the padding counts in `max_prefill_tokens` and is at most `MAX_PADDING_TOKENS`."""

    def prompt_chunks(self, max_tokens: int, now_s: float) -> list[Chunk]:
        chunks: list[Chunk] = []
        while len(self._running) < self.budget.max_batch:
            if chunks and self._pads_too_much(chunks):
                break
            left = max_tokens - sum(chunk.num_tokens for chunk in chunks)
            newcomer = self._admit_first(now_s, left if chunks else None)
            if newcomer is None:
                break
            chunks.append(prompt_chunk(newcomer, newcomer.num_uncomputed))
        return chunks

    def _pads_too_much(self, chunks: list[Chunk]) -> bool:
        """Whether the first that waits, as if no token of it were cached, must not be padded together with `chunks`."""
        first = self._waiting.first_prompt
        if first is None:
            return False
        lengths = [*(chunk.num_tokens for chunk in chunks), first.num_uncomputed]
        padded_tokens = len(lengths) * max(lengths)
        padding_tokens = padded_tokens - sum(lengths)
        return padded_tokens > self.budget.max_prefill_tokens or padding_tokens > MAX_PADDING_TOKENS


class PaddedScheduler(FastForwardScheduler):
    composer_type = PaddedComposer


def padded_load(chunks: Sequence[Chunk]) -> StepLoad:
    """What the step computes, padding included."""
    prompts = [chunk.num_tokens for chunk in chunks if chunk.is_prompt]
    return StepLoad.of_prompts(*[max(prompts)] * len(prompts)) if prompts else step_load(chunks)


PADDED: dict[str, Any] = {"policy": "prompt_first", "scheduler_type": PaddedScheduler, "load_of": padded_load}
"""Settings of an `InstanceSpec`."""
