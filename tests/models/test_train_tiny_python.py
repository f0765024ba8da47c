"""The parts of the training that decide what is learned, and that a run can be taken up again."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tandem.models.muon import orthogonalized
from tandem.models.tiny_tokenizer import train_tokenizer
from tandem.models.train_tiny_python import (
    Recipe,
    Run,
    batch_at,
    learn_pairs,
    make_optimizers,
    model_config,
    training_stream,
)

RECIPE = Recipe(
    seed=5,
    steps=100,
    step_tokens=64,
    sequence_tokens=16,
    long_sequence_tokens=32,
    long_fraction=0.1,
    pair_steps=30,
    warmup_steps=10,
    decay_fraction=0.5,
    adamw_learning_rate=1e-3,
    muon_learning_rate=1e-2,
    weight_decay=0.1,
    vocab_size=300,
)


def test_the_rate_rises_stays_and_falls() -> None:
    rates = [RECIPE.learning_rate_factor(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:50] == [1.0] * 41
    assert all(later < earlier for earlier, later in pairwise(rates[50:]))
    assert rates[-1] == pytest.approx(0.02)


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    stream = torch.arange(2000, dtype=torch.int32)
    longer = replace(RECIPE, steps=200)
    for step in range(50):
        assert longer.learning_rate_factor(step) == RECIPE.learning_rate_factor(step)
        assert torch.equal(batch_at(stream, longer, step), batch_at(stream, RECIPE, step))


def test_an_epoch_shows_every_window_once() -> None:
    stream = torch.arange(16 * 41 + 1, dtype=torch.int32)
    epoch = torch.cat([batch_at(stream, RECIPE, step) for step in range(10)])
    assert epoch.shape == (40, 17)
    assert torch.equal(epoch, epoch[:, :1] + torch.arange(17))
    assert len(epoch[:, 0].unique()) == 40
    assert set(epoch[:, 0].tolist()) != set(batch_at(stream, RECIPE, 10)[:, 0].tolist())


def test_the_last_steps_have_long_sequences() -> None:
    stream = torch.arange(2000, dtype=torch.int32)
    assert batch_at(stream, RECIPE, 89).shape == (4, 17)
    assert batch_at(stream, RECIPE, 90).shape == (2, 33)


def test_the_stream_has_whole_documents() -> None:
    tokenizer = train_tokenizer(["def f(): pass\n"], 270)
    stream = training_stream([], tokenizer, seed=0)
    assert stream[0] == tokenizer.token_to_id("<|begin|>")
    assert stream[-1] == tokenizer.token_to_id("<|end|>")
    assert "<|user|>Hello<|end|><|assistant|>I am tiny-python" in tokenizer.decode(
        stream.tolist(), skip_special_tokens=False
    )


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_orthogonalized_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before, after = torch.linalg.svdvals(matrix), torch.linalg.svdvals(orthogonalized(matrix))
    assert before.max() / before.min() > 2
    assert after.max() < 1.3
    assert after.min() > 0.4


def small_run() -> Run:
    torch.manual_seed(0)
    config = model_config(300)
    config.update({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 4})
    model = LlamaForCausalLM(config)
    return Run(model, make_optimizers(model, RECIPE), step=0, seconds=0.0, losses=[])


def test_pairs_teach_what_follows_what() -> None:
    model = small_run().model
    stream = torch.arange(3000, dtype=torch.int32) % 7
    learn_pairs(model, stream, steps=60)
    with torch.no_grad():
        logits: Any = model(input_ids=torch.arange(7)[None]).logits
    assert logits[0].argmax(dim=1).tolist() == [1, 2, 3, 4, 5, 6, 0]


def advance(run: Run) -> None:
    ids = torch.arange(16)[None] + run.step
    logits: Any = run.model(input_ids=ids).logits
    torch.autograd.backward(torch.nn.functional.cross_entropy(logits[0], ids[0]))
    for optimizer in run.optimizers.values():
        optimizer.step()
    run.model.zero_grad()
    run.step += 1


def test_a_run_taken_up_again_goes_on_as_if_never_interrupted(tmp_path: Path) -> None:
    straight, first, second = small_run(), small_run(), small_run()
    for _ in range(4):
        advance(straight)
    for _ in range(2):
        advance(first)
    first.losses.append((2, 5.5))
    first.save(tmp_path)
    second.restore(tmp_path)
    assert (second.step, second.losses) == (2, [(2, 5.5)])
    for _ in range(2):
        advance(second)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_a_first_run_begins_at_the_beginning(tmp_path: Path) -> None:
    run = small_run()
    run.restore(tmp_path)
    assert run.step == 0
