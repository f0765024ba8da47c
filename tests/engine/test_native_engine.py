"""The engine on the C++ kernels: transformers' tokens, and the same tokens whatever else is in the batch."""

import random
from pathlib import Path

import pytest

from tandem.core.errors import ConfigError
from tandem.core.request import SamplingParams
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine, load_engine
from tandem.engine.ops import choose
from tandem.engine.ops.native_library import NativeUnavailableError, load_native_library
from tandem.engine.step import SequenceSlice
from tests.engine.conftest import CONFIGS, Checkpoints
from tests.engine.driver import Driver


@pytest.fixture(scope="module", autouse=True)
def _needs_a_compiler() -> None:
    try:
        load_native_library()
    except NativeUnavailableError as error:
        pytest.skip(str(error))


def _engine(path: Path, dtype: str = "float32", num_threads: int = 1) -> Engine:
    config = EngineConfig(
        path,
        dtype=dtype,
        device="cpu",
        num_threads=num_threads,
        kv_memory_bytes=4 << 20,
        block_size=8,
        ops="native",
    )
    return load_engine(config)


def _prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(300), k=length)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_agree_with_transformers_in_mixed_batches(name: str, checkpoints: Checkpoints) -> None:
    reference = checkpoints[name]
    driver = Driver(_engine(reference.path))
    early = [driver.add(_prompt(length, seed=length), 20) for length in (1, 8, 30)]
    for _ in range(4):
        driver.step(early)
    sequences = [driver.add(_prompt(length, seed=length), 12) for length in (90, 17, 2)] + early
    answers = driver.run(sequences, chunk_tokens=16)
    for sequence, answer in zip(sequences, answers, strict=True):
        assert answer == reference.greedy(sequence.prompt, sequence.num_tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3", "opt"])
def test_sampled_tokens_and_kv_are_the_same_bits_alone_in_a_batch_and_recomputed(
    name: str, dtype: str, checkpoints: Checkpoints
) -> None:
    params = SamplingParams(temperature=1.3, seed=42, logprobs=5)
    prompt = _prompt(70)
    engine = _engine(checkpoints[name].path, dtype)
    driver = Driver(engine)
    alone = driver.add(prompt, 40, params)
    driver.run([alone])
    kv = engine.pool[:, :, alone.blocks].clone()

    engine = _engine(checkpoints[name].path, dtype, num_threads=3)
    driver = Driver(engine, seed=1)
    others = [driver.add(_prompt(9 + 30 * n, seed=n), 30, SamplingParams(seed=n)) for n in range(4)]
    batched = driver.add(prompt, 40, params)
    driver.run([*others[:2], batched, *others[2:]], chunk_tokens=13)
    assert batched.drawn == alone.drawn
    # The last token's KV was never computed.
    assert engine.pool[:, :, batched.blocks[:-1]].equal(kv[:, :, :-1])

    # What another worker does that takes over mid-answer: the whole sequence so far as one prompt.
    resumed = driver.add(alone.token_ids[:90], 20, params)
    driver.run([resumed])
    assert resumed.drawn == alone.drawn[20:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_logits_are_the_same_bits_decoded_in_chunks_and_in_a_batch(dtype: str, checkpoints: Checkpoints) -> None:
    """Every log-probability of every position: each token decoded, the prompt in chunks, and in one piece."""
    prompt = _prompt(50)
    results = []
    for chunk_tokens, num_threads, others in ((1, 1, 0), (50, 1, 0), (13, 3, 2), (50, 3, 3)):
        engine = _engine(checkpoints["qwen2"].path, dtype, num_threads)
        scores = []
        for start in range(0, len(prompt), chunk_tokens):
            end = min(start + chunk_tokens, len(prompt))
            following = prompt[end] if end < len(prompt) else 0
            part = SequenceSlice(
                prompt[start:end], start, list(range(7, 14)), prompt_logprobs=300, next_token_id=following
            )
            beside = [
                SequenceSlice(_prompt(9 + 30 * n, seed=n), 0, list(range(20 * n, 20 * n + 14))) for n in (1, 2, 3)
            ]
            entries = engine.step([*beside[:others], part]).prompt_logprobs[-1]
            assert entries is not None
            scores += [sorted(entry.top) for entry in entries]
        results.append((scores, engine.pool[:, :, 7:13].clone()))
    for scores, kv in results[1:]:
        assert scores == results[0][0]
        assert kv.equal(results[0][1])


def test_without_a_compiler_auto_means_torch_and_native_is_refused(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise NativeUnavailableError("no C++ compiler was found")

    monkeypatch.setattr(choose, "load_native_library", fail)
    path = checkpoints["llama"].path
    with caplog.at_level("INFO"):
        load_engine(EngineConfig(path, device="cpu", num_threads=1, kv_memory_bytes=1 << 20))
    assert "torch ops: no C++ compiler was found" in caplog.text
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        load_engine(EngineConfig(path, device="cpu", num_threads=1, kv_memory_bytes=1 << 20, ops="native"))
