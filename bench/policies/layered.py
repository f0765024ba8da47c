"""Layered prefill in the simulator (arXiv 2510.08055): a step computes whole prompts, but only in one group of layers.

Prompts of n tokens take as many steps as chunks of `max_prefill_tokens` would. Each of these steps computes one group
of layers for all n tokens, beside all layers of a token for each sequence that decodes. Weights of a group are read
once for a prompt, and not once for each chunk; earlier chunks' KV is not read again. Newcomers wait until the prompts
that are under way are through.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace

from tandem.core.cost_model import CostModel, StepCost, StepLoad, attention_pairs
from tandem.scheduling.batch_composer import BatchComposer
from tandem.scheduling.chunk import Chunk, prompt_chunk
from tandem.scheduling.fast_forward_scheduler import FastForwardScheduler
from tandem.scheduling.sequence import Sequence
from tandem.scheduling.step_load import step_load


class LayeredComposer(BatchComposer):
    """A prompt's chunk stands for its part of the layers: its tokens are this part of the prompt's."""

    def prompt_chunks(self, max_tokens: int, now_s: float) -> list[Chunk]:
        if not self._running.prompts:
            self._admit(max_tokens, now_s)
        under_way = list(self._running.prompts.values())
        num_steps = -(-sum(map(_num_own, under_way)) // self.budget.max_prefill_tokens)
        return [prompt_chunk(sequence, -(-_num_own(sequence) // num_steps)) for sequence in under_way]

    def _admit(self, max_tokens: int, now_s: float) -> None:
        left: int | None = None  # the first one may be of any length
        while len(self._running) < self.budget.max_batch and (left is None or left > 0):
            newcomer = self._admit_first(now_s, left)
            if newcomer is None:
                return
            left = (max_tokens if left is None else left) - newcomer.num_uncomputed


class LayeredScheduler(FastForwardScheduler):
    composer_type = LayeredComposer


@dataclass(frozen=True, slots=True)
class LayeredLoad(StepLoad):
    """A share `of_layers` of `whole`'s prompts is computed, and all of those that decode."""

    whole: StepLoad = field(default_factory=StepLoad)
    of_layers: float = 1.0


def layered_load(chunks: Many[Chunk]) -> StepLoad:
    load = step_load(chunks)
    prompts = [chunk.sequence for chunk in chunks if chunk.is_prompt]
    if not prompts:
        return load
    num_tokens = sum(map(_num_own, prompts))
    whole = replace(
        load,
        prefill_tokens=num_tokens,
        prefill_pairs=sum(attention_pairs(each.num_cached, _num_own(each)) for each in prompts),
        prefill_kv_tokens=sum(each.num_tokens for each in prompts),
    )
    fields = {name: getattr(load, name) for name in StepLoad.__dataclass_fields__}
    return LayeredLoad(**fields, whole=whole, of_layers=load.prefill_tokens / num_tokens)


class LayeredCost:
    """A `CostModel` that also prices a `LayeredLoad`."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost

    def step(self, load: StepLoad) -> StepCost:
        if not isinstance(load, LayeredLoad):
            return self._cost.step(load)
        decoding = load.decode_sequences
        alone = self._cost.step(StepLoad.of_decode(decoding, load.decode_kv_tokens)) if decoding else StepCost()
        whole = self._cost.step(load.whole).terms()
        terms = {name: each_s + load.of_layers * (whole[name] - each_s) for name, each_s in alone.terms().items()}
        return StepCost(**terms, interval_s=sum(terms.values()))

    def decode_coefficients(self, sequences: int) -> tuple[float, float]:
        return self._cost.decode_coefficients(sequences)


def _num_own(sequence: Sequence) -> int:
    """Tokens that its chunks compute."""
    return sequence.num_tokens - sequence.num_cached
