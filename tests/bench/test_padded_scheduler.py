from bench.fidelity.distserve.padded_scheduler import MAX_PADDING_TOKENS, PaddedScheduler, padded_load
from tandem.core.cost_model import StepLoad
from tandem.core.request import GenerationRequest, SamplingParams
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.budget import StepBudget
from tandem.scheduling.chunk import Chunk
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.sequence import Sequence


def test_padded_prompts_share_a_step_while_budget_and_padding_allow() -> None:
    scale = MAX_PADDING_TOKENS // 3
    pool = BlockPool(4000)
    budget = StepBudget(8, 24 * scale, 24 * scale, 8, "prompt_first")
    scheduler = PaddedScheduler(budget, pool, PrefixIndex(pool, 4, enabled=False), max_model_len=10_000)

    def add(name: str, num_tokens: int) -> None:
        request = GenerationRequest(name, (1,) * num_tokens * scale, SamplingParams(max_tokens=50))
        scheduler.add(Sequence(name, request, 0.0))

    def step() -> list[Chunk]:
        chunks = scheduler.next_batch(0.0)
        for chunk in chunks:
            assert scheduler.computed(chunk)
            scheduler.generated(chunk.sequence.key, 0)
        return chunks

    for name, num_tokens in (("a", 5), ("longer", 8), ("b", 8), ("c", 8), ("short", 4)):
        add(name, num_tokens)
    # In units of `scale`: a + longer are 16 tokens, 3 of them padding; with b 24 and 3; c would make it 32.
    first = step()
    assert [chunk.sequence.key for chunk in first] == ["a", "longer", "b"]
    assert padded_load(first) == StepLoad.of_prompts(8 * scale, 8 * scale, 8 * scale)
    # short would be padded by 4
    assert [chunk.sequence.key for chunk in step()] == ["c"]
    assert [chunk.sequence.key for chunk in step()] == ["short"]
    assert [chunk.is_prompt for chunk in step()] == [False] * 5
