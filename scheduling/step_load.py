"""The chunks of a step as the sums that a cost model needs."""

from collections.abc import Sequence

from tandem.core.cost_model import StepLoad, attention_pairs
from tandem.scheduling.chunk import Chunk


def step_load(chunks: Sequence[Chunk]) -> StepLoad:
    """Tokens that are recomputed after a preemption count as prompt tokens."""
    tokens = sequences = pairs = prompt_kv_tokens = decode_kv_tokens = sampled = 0
    for chunk in chunks:
        sampled += chunk.samples
        if chunk.is_prompt:
            sequences += 1
            tokens += chunk.num_tokens
            pairs += attention_pairs(chunk.start, chunk.num_tokens)
            prompt_kv_tokens += chunk.start + chunk.num_tokens
        else:
            decode_kv_tokens += chunk.start + 1
    return StepLoad(
        prefill_tokens=tokens,
        prefill_sequences=sequences,
        prefill_pairs=pairs,
        prefill_kv_tokens=prompt_kv_tokens,
        decode_sequences=len(chunks) - sequences,
        decode_kv_tokens=decode_kv_tokens,
        sampled=sampled,
    )
