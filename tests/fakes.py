"""Stand-ins that several packages' tests need."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tandem.core.errors import InternalError
from tandem.core.kv_layout import KvLayout
from tandem.core.request import SampledToken, TokenLogprob
from tandem.engine.config import Capacity
from tandem.engine.step import SequenceSlice, StepOutput

LAYOUT = KvLayout(2, 32, 1, 4, 8, "float32", "fake")
EOS = 99


def next_token(token_ids: Sequence[int], position: int) -> int:
    """What the fake model draws: any function of the last token and the position will do."""
    return (token_ids[-1] * 7 + position) % 90


@dataclass
class FakeEngine:
    """An engine without a model. `before_step` may raise, as torch does when memory is short."""

    layout: KvLayout = LAYOUT
    max_model_len: int = 64
    before_step: Callable[[], None] = lambda: None
    broken_positions: set[int] = field(default_factory=set)
    draw: Callable[[Sequence[int], int], int] = next_token
    steps: list[list[SequenceSlice]] = field(default_factory=list)
    num_stages: int = 1
    is_settled: bool = True

    @property
    def spec(self) -> Any:
        return SimpleNamespace(eos_token_ids=(EOS,), vocab_size=100)

    @property
    def next_step(self) -> int:
        return len(self.steps) + 1

    def capacity(self) -> Capacity:
        return Capacity(self.layout.num_blocks, self.layout.block_size, self.max_model_len)

    def step(self, slices: Sequence[SequenceSlice]) -> StepOutput:
        return self.collect(self.launch(slices))

    def collect(self, handle: StepOutput) -> StepOutput:
        return handle

    def settle(self) -> None:
        """There are no other ranks."""

    def launch(
        self, slices: Sequence[SequenceSlice], layer_computed: Callable[[int], None] | None = None
    ) -> StepOutput:
        """Computes the output at once: it is its own handle."""
        self.before_step()
        for layer in range(self.layout.num_layers if layer_computed is not None else 0):
            layer_computed(layer + 1)  # type: ignore[misc]
        self.steps.append(list(slices))
        output = StepOutput([None] * len(slices), [None] * len(slices), [None] * len(slices))
        for index, part in enumerate(slices):
            assert len(part.block_table) * self.layout.block_size >= part.start + len(part.token_ids)
            if part.prompt_logprobs is not None:
                following = [*part.token_ids[1:], *([part.next_token_id] if part.next_token_id is not None else [])]
                output.prompt_logprobs[index] = [TokenLogprob(token_id, -1.0) for token_id in following]
            if part.sample is not None:
                if part.sample.position in self.broken_positions:
                    output.errors[index] = InternalError("the logits are not numbers")
                else:
                    output.tokens[index] = SampledToken(self.draw(part.token_ids, part.sample.position))
        return output
