"""The two halves of a step: several launched before the first is collected, the forward pass alone, sampling alone."""

import random
from dataclasses import replace

import pytest
import torch

from tandem.core.request import SamplingParams
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine, load_engine
from tandem.engine.sampler import sample_slices
from tandem.engine.step import SampleRequest, SequenceSlice
from tests.engine.conftest import Checkpoints
from tests.engine.driver import Driver, RunningSequence

_PARAMS = SamplingParams(temperature=1.1, seed=7, logprobs=3, frequency_penalty=0.2)


def _engine(checkpoints: Checkpoints, ops: str) -> Engine:
    path = checkpoints["qwen3"].path
    return load_engine(EngineConfig(path, device="cpu", num_threads=1, kv_memory_bytes=4 << 20, block_size=8, ops=ops))


def _prompt(length: int) -> list[int]:
    return random.Random(length).choices(range(300), k=length)


def _groups(driver: Driver) -> list[list[RunningSequence]]:
    return [[driver.add(_prompt(length), 12, _PARAMS) for length in lengths] for lengths in ((5, 40, 1), (23, 2))]


def test_steps_of_disjoint_groups_may_overlap(checkpoints: Checkpoints, ops: str) -> None:
    """launch, launch, collect, collect: the same tokens, log-probabilities and KV, to the last bit."""
    engine = _engine(checkpoints, ops)
    driver = Driver(engine)
    expected = _groups(driver)
    for group in expected:
        driver.run(group, chunk_tokens=9)

    overlapping = _engine(checkpoints, ops)
    driver = Driver(overlapping)
    groups = _groups(driver)
    while not all(sequence.finished for group in groups for sequence in group):
        for step in [driver.launch(group, chunk_tokens=9) for group in groups if not all(s.finished for s in group)]:
            driver.collect(step)
    for group, expected_group in zip(groups, expected, strict=True):
        assert [sequence.drawn for sequence in group] == [sequence.drawn for sequence in expected_group]
    assert overlapping.pool.equal(engine.pool)


def test_handles_are_collected_in_the_order_of_their_launch_and_once(checkpoints: Checkpoints) -> None:
    engine = _engine(checkpoints, "torch")
    first, second, third = (engine.launch([SequenceSlice([index], 0, [index])]) for index in range(3))
    engine.collect(first)
    with pytest.raises(AssertionError, match="order"):
        engine.collect(first)
    engine.collect(third)  # the second one is given up
    with pytest.raises(AssertionError, match="order"):
        engine.collect(second)


def test_a_rank_that_only_computes_has_the_same_kv_and_hidden_states(checkpoints: Checkpoints, ops: str) -> None:
    """A follower: the forward pass on another engine, then sampling with the first one's output weights."""
    leader, follower = _engine(checkpoints, ops), _engine(checkpoints, ops)
    prompt = _prompt(30)
    request = SampleRequest(_PARAMS, 30, prompt, 30)
    slices = [
        SequenceSlice(prompt, 0, [3, 1, 4, 5], request),
        SequenceSlice(prompt[:7], 0, [2], prompt_logprobs=2),
        SequenceSlice(prompt[:1], 0, [0], replace(request, position=1, history=prompt[:1], num_prompt_tokens=1)),
        SequenceSlice(prompt[:6], 0, [6]),
    ]
    handle = leader.launch(slices)
    hidden = follower.forward(slices)
    assert len(hidden) == 1 + 7 + 1
    assert hidden.equal(handle.hidden)
    assert follower.pool.equal(leader.pool)


def test_sampling_needs_no_model() -> None:
    """Hidden states that are logits already: rows belong to slices in their order, and a bad row fails alone."""
    logits = torch.full((6, 8), -20.0)
    logits[torch.arange(6), torch.tensor([5, 1, 2, 3, 4, 6])] = 20.0
    logits[5, 0] = torch.nan
    request = SampleRequest(SamplingParams(temperature=0.0), 3, (), 3)
    slices = [
        SequenceSlice([0, 0, 0], 0, [0], request),
        SequenceSlice([0, 0], 0, [1]),
        SequenceSlice([0, 1, 2], 0, [2], request, prompt_logprobs=1, next_token_id=7),
        SequenceSlice([0], 2, [3], request),
        SequenceSlice([0], 2, [4], request),
    ]
    output = sample_slices(slices, logits, lambda hidden: hidden)
    assert [token and token.token_id for token in output.tokens] == [5, None, 3, 4, None]
    assert [error is None for error in output.errors] == [True, True, True, True, False]
    entries = output.prompt_logprobs[2]
    assert entries is not None
    assert [(entry.token_id, entry.top[0][0]) for entry in entries] == [(1, 1), (2, 2), (7, 3)]
    assert [entries is None for entries in output.prompt_logprobs] == [True, True, False, True, True]
