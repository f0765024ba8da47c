"""The engine on a CUDA device, against the same reference as on CPUs."""

import random

import pytest
import torch

from tandem.core.request import SamplingParams
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine, load_engine
from tests.engine.conftest import CONFIGS, Checkpoints
from tests.engine.driver import Driver

pytestmark = pytest.mark.gpu


def _engine(name: str, checkpoints: Checkpoints, device: str) -> Engine:
    return load_engine(
        EngineConfig(checkpoints[name].path, dtype="float32", device=device, num_threads=1, kv_memory_bytes=4 << 20)
    )


def _prompt(length: int) -> list[int]:
    return random.Random(length).choices(range(300), k=length)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_agree_in_mixed_batches(name: str, checkpoints: Checkpoints) -> None:
    engine = _engine(name, checkpoints, "cuda")
    assert engine.pool.is_cuda
    engine.warm_up()
    driver = Driver(engine)
    early = [driver.add(_prompt(length), 20) for length in (1, 8, 30)]
    for _ in range(4):
        driver.step(early)
    sequences = [*early, *(driver.add(_prompt(length), 12) for length in (90, 17, 2))]
    answers = driver.run(sequences, chunk_tokens=16)
    for sequence, answer in zip(sequences, answers, strict=True):
        assert answer == checkpoints[name].greedy(sequence.prompt, sequence.num_tokens)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_launch_does_not_wait_for_the_device(checkpoints: Checkpoints) -> None:
    engine = _engine("llama", checkpoints, "cuda")
    engine.warm_up()
    driver = Driver(engine)
    groups = [[driver.add(_prompt(length), 6) for length in lengths] for lengths in ((9, 30), (17,))]
    for _ in range(6):
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps = [driver.launch(group) for group in groups]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for step in steps:
            driver.collect(step)
    for sequence in (sequence for group in groups for sequence in group):
        answer = [token.token_id for token in sequence.drawn]
        assert answer == checkpoints["llama"].greedy(sequence.prompt, sequence.num_tokens)


def test_a_seeded_request_draws_the_same_on_either_device(checkpoints: Checkpoints) -> None:
    params = SamplingParams(temperature=0.8, top_k=30, top_p=0.9, frequency_penalty=0.2, seed=3, logprobs=2)
    answers = []
    for device in ("cpu", "cuda"):
        driver = Driver(_engine("llama", checkpoints, device))
        answers.append(driver.run([driver.add(_prompt(20), 24, params)]))
    assert answers[0] == answers[1]
