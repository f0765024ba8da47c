"""The cluster's greedy tokens are those of transformers, one by one, whatever else is served and however KV travels."""

import asyncio
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tandem import AsyncClient
from tandem.models.random_checkpoint import CheckpointShape, write_random_checkpoint
from tests.cluster.harness import Cluster, running_cluster

NUM_PROMPTS = 64
MAX_PROMPT_TOKENS = 2000
NUM_NEW_TOKENS = 12

FAMILIES = (
    pytest.param("llama", marks=pytest.mark.slow),  # as the built-in model
    pytest.param("mistral", marks=pytest.mark.slow),  # what is theirs is tested in tests/engine
    pytest.param("qwen2", marks=pytest.mark.slow),
    "qwen3",
    "opt",
)


def prompts(vocab_size: int, seed: int = 7) -> list[list[int]]:
    """Lengths from 1 to 2,000, most of them short, both ends included; some share long prefixes."""
    draw = random.Random(seed)
    lengths = [1, MAX_PROMPT_TOKENS] + [int(MAX_PROMPT_TOKENS ** draw.random()) for _ in range(NUM_PROMPTS - 2)]
    shared = [draw.randrange(3, vocab_size) for _ in range(MAX_PROMPT_TOKENS)]
    made = []
    for index, length in enumerate(lengths):
        kept = length // 2 if index % 4 == 0 else 0
        made.append(shared[:kept] + [draw.randrange(3, vocab_size) for _ in range(length - kept)])
    draw.shuffle(made)
    return made


@cache
def reference_model(model_path: Path) -> PreTrainedModel:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)


@cache
def reference_tokens(model_path: Path, token_ids: tuple[int, ...]) -> list[int]:
    """Computed once for all tests that have this prompt."""
    with torch.inference_mode():
        output = reference_model(model_path).generate(
            torch.tensor([token_ids]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
            max_new_tokens=NUM_NEW_TOKENS,
            min_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    answer: list[int] = output[0, len(token_ids) :].tolist()
    return answer


async def cluster_tokens(cluster: Cluster, prompt_ids: list[list[int]]) -> list[list[int]]:
    async with AsyncClient(cluster.grpc_address) as client:

        async def one(token_ids: list[int]) -> list[int]:
            completion = await client.generate(
                token_ids=token_ids, max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True, timeout_s=100.0
            )
            return list(completion.token_ids)

        return await asyncio.gather(*(one(token_ids) for token_ids in prompt_ids))


def check_tokens(cluster: Cluster, vocab_size: int) -> None:
    """64 prompts at once; one decode instance fetches over shared memory, the other over gloo."""
    prompt_ids = prompts(vocab_size)
    answers = asyncio.run(cluster_tokens(cluster, prompt_ids))
    transports = {link.transport for status in cluster.instances() for link in status.links if link.transfers}
    assert transports == {"shared_memory", "gloo"}
    check_answers(cluster, prompt_ids, answers)


def check_answers(cluster: Cluster, prompt_ids: list[list[int]], answers: list[list[int]]) -> None:
    wanted = [reference_tokens(cluster.model, tuple(token_ids)) for token_ids in prompt_ids]
    wrong = [
        (len(prompt), got, want) for prompt, got, want in zip(prompt_ids, answers, wanted, strict=True) if got != want
    ]
    assert not wrong, f"{len(wrong)} of {len(prompt_ids)} answers differ: {wrong[:3]}"


@pytest.mark.timeout(300)
def test_built_in_model(cluster: Cluster) -> None:
    check_tokens(cluster, 4000)


@pytest.mark.timeout(300)
@pytest.mark.unmeasured
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path) -> None:
    shape = CheckpointShape(
        family=family,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4 if family == "opt" else 2,
        head_dim=16,
        vocab_size=320,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = write_random_checkpoint(tmp_path / family, shape, seed=3)
    prefill = {"max_batch_tokens": 512}  # long prompts go in several chunks, beside others
    with running_cluster(model, tmp_path, decode_transports=("shared_memory", "gloo"), prefill=prefill) as cluster:
        check_tokens(cluster, 320)
