"""The chunks of a step as a cost model sees them."""

from collections.abc import Sequence

from tandem.core.cost_model import StepLoad, attention_pairs
from tandem.scheduling.scheduler import Chunk


def load_of(prompts: Sequence[Chunk], decoding: Sequence[Chunk] = (), *, sampled: int) -> StepLoad:
    """`prompts` are computed for the first time or again, `decoding` are single tokens; `sampled` of all draw one."""
    return StepLoad(
        prefill_tokens=sum(chunk.num_tokens for chunk in prompts),
        prefill_sequences=len(prompts),
        prefill_pairs=sum(attention_pairs(chunk.start, chunk.num_tokens) for chunk in prompts),
        prefill_kv_tokens=sum(chunk.start + chunk.num_tokens for chunk in prompts),
        decode_sequences=len(decoding),
        decode_kv_tokens=sum(chunk.start + 1 for chunk in decoding),
        sampled=sampled,
    )
