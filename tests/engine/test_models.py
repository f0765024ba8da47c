"""Every family against transformers: the same logits, and token by token the same greedy answers in mixed batches."""

import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from tandem.core.errors import ConfigError
from tandem.core.request import SamplingParams
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine, load_engine
from tandem.engine.step import SampleRequest, SequenceSlice
from tests.engine.conftest import CONFIGS, Checkpoints, write_checkpoint
from tests.engine.driver import Driver


def _engine(
    path: Path,
    dtype: str = "float32",
    ops: str = "torch",
    max_model_len: int | None = None,
    kv_memory_bytes: int = 4 << 20,
) -> Engine:
    return load_engine(
        EngineConfig(
            path,
            dtype=dtype,
            device="cpu",
            num_threads=1,
            kv_memory_bytes=kv_memory_bytes,
            block_size=8,
            max_model_len=max_model_len,
            ops=ops,
        )
    )


def _prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(300), k=length)


def _check_scores(engine: Engine, prompt: list[int], chunk_tokens: int, expected: torch.Tensor, atol: float) -> None:
    """Compare the log-probabilities of every position, computed in chunks, with `expected` logits [tokens, vocab]."""
    scores = expected.log_softmax(-1)
    blocks = list(range(3, 3 + engine.layout.blocks_for(len(prompt))))[::-1]
    for start in range(0, len(prompt), chunk_tokens):
        end = start + chunk_tokens
        following = prompt[end] if end < len(prompt) else None
        part = SequenceSlice(prompt[start:end], start, blocks, prompt_logprobs=12, next_token_id=following)
        entries = engine.step([part]).prompt_logprobs[0]
        assert entries is not None
        assert [entry.token_id for entry in entries] == prompt[start + 1 : end + 1]
        for position, entry in enumerate(entries, start):
            assert entry.logprob == pytest.approx(float(scores[position, entry.token_id]), abs=atol)
            top = torch.tensor([score for _, score in entry.top])
            torch.testing.assert_close(top, scores[position, [token for token, _ in entry.top]], atol=atol, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_agree_in_float32(name: str, ops: str, checkpoints: Checkpoints) -> None:
    engine = _engine(checkpoints[name].path, ops=ops)
    prompt = _prompt(100)
    expected = checkpoints[name].logits(prompt)
    for chunk_tokens in (100, 37):
        _check_scores(engine, prompt, chunk_tokens, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "qwen3", "opt"])
def test_logits_agree_loosely_in_bfloat16(name: str, ops: str, checkpoints: Checkpoints) -> None:
    engine = _engine(checkpoints[name].path, dtype="bfloat16", ops=ops)
    prompt = _prompt(60)
    _check_scores(engine, prompt, 25, checkpoints[name].logits(prompt), atol=0.6)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_agree_in_mixed_batches(name: str, checkpoints: Checkpoints) -> None:
    """Packed prompts, chunked prompts and decodes with scattered blocks, in the same steps."""
    reference = checkpoints[name]
    driver = Driver(_engine(reference.path))
    early = [driver.add(_prompt(length, seed=length), 20) for length in (1, 8, 30)]
    for _ in range(4):
        driver.step(early)
    late = [driver.add(_prompt(length, seed=length), 12) for length in (90, 17, 2)]
    sequences = [late[0], early[0], late[1], *early[1:], late[2]]
    answers = driver.run(sequences, chunk_tokens=16)
    for sequence, answer in zip(sequences, answers, strict=True):
        assert answer == reference.greedy(sequence.prompt, sequence.num_tokens)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "qwen3", "opt"])
def test_greedy_tokens_agree_for_64_prompts_of_up_to_2000_tokens_at_once(
    name: str, ops: str, long_checkpoints: Checkpoints
) -> None:
    reference = long_checkpoints[name]
    rng = random.Random(7)
    driver = Driver(_engine(reference.path, ops=ops, kv_memory_bytes=256 << 20))
    lengths = [1, 2, 2000, *(rng.randint(1, 2000) for _ in range(61))]
    sequences = [driver.add(_prompt(length, seed=length), 8) for length in lengths]
    answers = driver.run(sequences, chunk_tokens=512)
    for sequence, answer in zip(sequences, answers, strict=True):
        expected = reference.greedy(sequence.prompt, sequence.num_tokens)
        if answer != expected:
            # Of some 2,500 random choices one may be too close for float32: transformers then differs from itself too,
            # with and without a cache.
            first = next(index for index, token in enumerate(expected) if answer[index] != token)
            logits = reference.logits(sequence.prompt + expected[:first])[-1]
            assert abs(float(logits[answer[first]] - logits[expected[first]])) < 2e-6


def test_dynamic_rope_grows_beyond_the_trained_context_as_transformers_does(checkpoints: Checkpoints) -> None:
    reference = checkpoints["llama-dynamic"]
    driver = Driver(_engine(reference.path))
    sequence = driver.add(_prompt(250), 30)
    assert driver.run([sequence], chunk_tokens=100) == [reference.greedy(sequence.prompt, 30)]


def test_longrope_takes_the_long_factors_for_a_context_beyond_the_trained_one(
    tmp_path: Path, checkpoints: Checkpoints
) -> None:
    config: PreTrainedConfig = type(CONFIGS["llama-longrope"]).from_dict(CONFIGS["llama-longrope"].to_dict())
    assert config.rope_parameters is not None
    config.rope_parameters["original_max_position_embeddings"] = 32
    reference = write_checkpoint(config, tmp_path)
    prompt = _prompt(60)
    _check_scores(_engine(tmp_path), prompt, 60, reference.logits(prompt), atol=1e-4)
    limited = _engine(tmp_path, max_model_len=32)
    _check_scores(limited, prompt[:32], 32, reference.logits(prompt[:32]), atol=1e-4)


def test_a_seeded_request_draws_the_same_alone_and_in_a_batch(checkpoints: Checkpoints) -> None:
    engine = _engine(checkpoints["llama"].path)
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=42, repetition_penalty=1.1)
    driver = Driver(engine)
    alone = driver.run([driver.add(_prompt(20), 24, params)])
    driver = Driver(engine, seed=1)
    others = [driver.add(_prompt(9, seed=n), 24, SamplingParams(seed=n)) for n in range(5)]
    sequences = [*others[:3], driver.add(_prompt(20), 24, params), *others[3:]]
    assert driver.run(sequences, chunk_tokens=7)[3] == alone[0]


def test_a_row_that_is_not_a_number_fails_alone(checkpoints: Checkpoints) -> None:
    """One sequence's KV is poisoned; the others of the step get their tokens, and so do later users of its blocks."""
    reference = checkpoints["llama"]
    engine = _engine(reference.path)
    prompt = _prompt(12)
    request = SampleRequest(SamplingParams(temperature=0.0), 12, prompt, 12)
    engine.step([SequenceSlice(prompt[:11], 0, [4, 5])])
    engine.step([SequenceSlice(prompt[:11], 0, [6, 7])])
    engine.pool[:, :, 4:6] = float("nan")
    output = engine.step([SequenceSlice(prompt[11:], 11, blocks, request) for blocks in ([4, 5], [6, 7])])
    expected = reference.greedy(prompt, 1)[0]
    assert output.tokens[0] is None
    assert output.errors[0] is not None
    assert output.tokens[1] is not None
    assert output.tokens[1].token_id == expected
    assert output.errors[1] is None
    part = SequenceSlice(prompt[11:], 11, [4, 5], request, prompt_logprobs=0, next_token_id=1)
    scored = engine.step([part])
    assert scored.prompt_logprobs == [None]
    assert scored.tokens == [None]
    engine.step([SequenceSlice(prompt[:11], 0, [4, 5])])
    again = engine.step([SequenceSlice(prompt[11:], 11, [4, 5], request)])
    assert again.tokens[0] is not None
    assert again.tokens[0].token_id == expected


def test_capacity_is_limited_by_the_model_and_by_the_pool(checkpoints: Checkpoints) -> None:
    path = checkpoints["llama"].path
    assert _engine(path).capacity().max_model_len == 256
    block_bytes = 3 * 2 * 2 * 16 * 4 * 16
    small = load_engine(
        EngineConfig(path, dtype="float32", device="cpu", num_threads=1, kv_memory_bytes=5 * block_bytes, ops="torch")
    )
    assert (small.capacity().num_blocks, small.capacity().max_model_len) == (5, 80)
    assert small.pool.shape == small.layout.shape
    with pytest.raises(ConfigError, match="context of 256 tokens"):
        _engine(path, max_model_len=257)


def test_the_pool_lives_where_the_caller_wants_it(checkpoints: Checkpoints) -> None:
    memory: list[torch.Tensor] = []

    def allocate(pool_bytes: int) -> torch.Tensor:
        memory.append(torch.zeros(pool_bytes, dtype=torch.uint8))
        return memory[0]

    config = EngineConfig(
        checkpoints["llama"].path, dtype="bfloat16", device="cpu", num_threads=1, kv_memory_bytes=1 << 20, ops="torch"
    )
    engine = load_engine(config, allocate)
    assert memory[0].numel() == engine.layout.pool_bytes
    engine.warm_up()
    assert not memory[0].any()
    engine.step([SequenceSlice(_prompt(5), 0, [2])])
    assert memory[0].view(torch.bfloat16).view(engine.layout.shape)[1, 0, 2].any()
