"""The chunks of a step as a cost model sees them."""

from collections.abc import Sequence

from tandem.core.cost_model import StepLoad, attention_pairs
from tandem.scheduling.scheduler import Chunk


def step_load(chunks: Sequence[Chunk]) -> StepLoad:
    """Prompts that are computed again, after a preemption, count as prompts."""
    prompts = [chunk for chunk in chunks if chunk.is_prompt]
    decoding = len(chunks) - len(prompts)
    return StepLoad(
        prefill_tokens=sum(chunk.num_tokens for chunk in prompts),
        prefill_sequences=len(prompts),
        prefill_pairs=sum(attention_pairs(chunk.start, chunk.num_tokens) for chunk in prompts),
        prefill_kv_tokens=sum(chunk.start + chunk.num_tokens for chunk in prompts),
        decode_sequences=decoding,
        decode_kv_tokens=sum(chunk.start + 1 for chunk in chunks if not chunk.is_prompt),
        sampled=decoding + sum(chunk.samples for chunk in prompts),
    )
