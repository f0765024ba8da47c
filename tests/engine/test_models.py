"""Every family against transformers: the same logits, and token by token the same greedy answers in mixed batches."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from tandem.core.errors import ConfigError
from tandem.core.request import SamplingParams
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine, load_engine
from tandem.engine.ops.interface import PackedLinear
from tandem.engine.ops.torch_ops import TorchOps
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


def _all_scores(engine: Engine, prompt: list[int], chunk_tokens: int) -> torch.Tensor:
    """Log-probabilities [tokens - 1, vocab] of a prompt computed in chunks."""
    vocab_size = engine.spec.vocab_size
    scores = torch.empty(len(prompt) - 1, vocab_size)
    blocks = list(range(engine.layout.blocks_for(len(prompt))))
    for start in range(0, len(prompt), chunk_tokens):
        end = start + chunk_tokens
        following = prompt[end] if end < len(prompt) else None
        part = SequenceSlice(prompt[start:end], start, blocks, prompt_logprobs=vocab_size, next_token_id=following)
        entries = engine.step([part]).prompt_logprobs[0]
        assert entries is not None
        for row, entry in enumerate(entries, start):
            token_ids, values = zip(*entry.top, strict=True)
            scores[row, list(token_ids)] = torch.tensor(values)
    return scores


def _deviation(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of log-probabilities [rows, vocab]: root mean square of the differences, as a share of the values' spread."""
    return float((actual - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm())


def _bfloat16_deviation(num_layers: int) -> float:
    """How far bf16 may be from float32.

    Each layer rounds 7 weights and 9 results (2 norms, qkv, rotation, attention, its projection, gate and up, down,
    residual) by at most half an eps each; independent errors add like their squares.
    """
    return torch.finfo(torch.bfloat16).eps / 2 * (16 * num_layers) ** 0.5


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "qwen3", "opt"])
def test_logits_agree_in_bfloat16_as_far_as_the_format_allows(name: str, ops: str, checkpoints: Checkpoints) -> None:
    engine = _engine(checkpoints[name].path, dtype="bfloat16", ops=ops)
    prompt = _prompt(60)
    expected = checkpoints[name].logits(prompt).log_softmax(-1)[:-1]
    assert _deviation(_all_scores(engine, prompt, 25), expected) < _bfloat16_deviation(engine.spec.num_layers)


def _with_scale(ops: TorchOps, *arguments: Any) -> torch.Tensor:
    q, kv, meta, heads, scale, window = arguments
    return _attention(ops, q, kv, meta, heads, scale * 1.03, window)


def _with_window(ops: TorchOps, *arguments: Any) -> torch.Tensor:
    return _attention(ops, *arguments[:-1], 55)


def _with_gelu(ops: TorchOps, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    gate, up = ops.linear(x, packed).chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate) * up


_attention = TorchOps.paged_attention


@pytest.mark.parametrize(
    ("method", "wrong"),
    [("paged_attention", _with_scale), ("paged_attention", _with_window), ("gated_linear", _with_gelu)],
    ids=["attention-3-percent-sharper", "attention-5-tokens-short", "another-activation"],
)
def test_a_wrong_kernel_is_further_off_than_bfloat16_allows(
    method: str, wrong: Callable[..., torch.Tensor], checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchOps, method, wrong)
    engine = _engine(checkpoints["llama"].path, dtype="bfloat16")
    prompt = _prompt(60)
    expected = checkpoints["llama"].logits(prompt).log_softmax(-1)[:-1]
    assert _deviation(_all_scores(engine, prompt, 25), expected) > _bfloat16_deviation(engine.spec.num_layers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_computes_a_sequence_alike_alone_in_a_batch_and_in_chunks(dtype: str, checkpoints: Checkpoints) -> None:
    """Within rounding only: the promise of equal bits is the native kernels' (see test_native_engine)."""
    engine = _engine(checkpoints["llama"].path, dtype=dtype)
    prompt = _prompt(60)
    alone = _all_scores(engine, prompt, 60)
    limit = 1e-5 if dtype == "float32" else _bfloat16_deviation(engine.spec.num_layers)
    for chunk_tokens in (1, 7, 25):
        assert _deviation(_all_scores(engine, prompt, chunk_tokens), alone) < limit
    others = [
        SequenceSlice(_prompt(length, seed=length), 0, list(range(20 + 10 * n, 30 + 10 * n)))
        for n, length in enumerate((1, 40, 80))
    ]
    part = SequenceSlice(prompt, 0, list(range(8)), prompt_logprobs=300)
    entries = engine.step([*others[:2], part, *others[2:]]).prompt_logprobs[2]
    assert entries is not None
    batched = torch.empty_like(alone)
    for row, entry in enumerate(entries):
        token_ids, values = zip(*entry.top, strict=True)
        batched[row, list(token_ids)] = torch.tensor(values)
    assert _deviation(batched, alone) < limit


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


def test_kv_of_other_longrope_factors_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Keys rotated by other factors are wrong; other kernels or an equal choice of factors are not."""
    config: PreTrainedConfig = type(CONFIGS["llama-longrope"]).from_dict(CONFIGS["llama-longrope"].to_dict())
    assert config.rope_parameters is not None
    config.rope_parameters["original_max_position_embeddings"] = 32
    write_checkpoint(config, tmp_path)
    short, long, longer = (_engine(tmp_path, max_model_len=length).layout for length in (32, 33, 256))
    assert long.fingerprint == longer.fingerprint
    assert short.fingerprint != long.fingerprint
    path = checkpoints["llama-dynamic"].path  # a rotation that depends on the position alone
    assert _engine(path, max_model_len=32).layout.fingerprint == _engine(path).layout.fingerprint
    assert _engine(path, dtype="bfloat16").layout.fingerprint != _engine(path).layout.fingerprint


def test_kv_of_other_kernels_is_used_within_rounding(ops: str, checkpoints: Checkpoints) -> None:
    """A prompt's KV from torch, the rest from either backend: such a pair is allowed, equal bits are not promised."""
    prompt = _prompt(40)
    source, destination = _engine(checkpoints["llama"].path), _engine(checkpoints["llama"].path, ops=ops)
    assert source.layout.fingerprint == destination.layout.fingerprint
    source.step([SequenceSlice(prompt[:30], 0, list(range(5)))])
    destination.pool.copy_(source.pool)
    part = SequenceSlice(prompt[30:], 30, list(range(5)), prompt_logprobs=300)
    entries = destination.step([part]).prompt_logprobs[0]
    assert entries is not None
    expected = checkpoints["llama"].logits(prompt).log_softmax(-1)
    for row, entry in enumerate(entries, 30):
        assert entry.logprob == pytest.approx(float(expected[row, entry.token_id]), abs=1e-4)


def test_a_seeded_request_draws_the_same_alone_and_in_a_batch(checkpoints: Checkpoints) -> None:
    engine = _engine(checkpoints["llama"].path)
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=42, repetition_penalty=1.1)
    driver = Driver(engine)
    alone = driver.run([driver.add(_prompt(20), 24, params)])
    driver = Driver(engine, seed=1)
    others = [driver.add(_prompt(9, seed=n), 24, SamplingParams(seed=n)) for n in range(5)]
    sequences = [*others[:3], driver.add(_prompt(20), 24, params), *others[3:]]
    assert driver.run(sequences, chunk_tokens=7)[3] == alone[0]


def test_a_row_that_is_not_finite_fails_alone(checkpoints: Checkpoints) -> None:
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
