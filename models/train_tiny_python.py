"""Trains tiny-python, the built-in model: `python -m models.train_tiny_python --out models/tiny-python`.

Trains a Llama-architecture model of a few million parameters on the Python standard library, on a laptop CPU, in fp32,
compiled. The learning rate rises, is constant, and falls over the last part of `--steps`. Until it falls, training does
not depend on `--steps`, so a resumed run may have another number of steps. Ctrl-C saves and ends; the same command
continues. `--export-only` writes the model of the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from tandem.models.export_tiny_python import TrainingRecord, export
from tandem.models.muon import Muon
from tandem.models.stdlib_corpus import (
    SourceFile,
    chats,
    corpus_digest,
    introductions,
    pieces,
    split_held_out,
    standard_library,
)
from tandem.models.tiny_tokenizer import BEGIN, END, render_chat, train_tokenizer

HELD_OUT_FRACTION = 0.04
INTRODUCTION_COPIES = 40


@dataclass(frozen=True, slots=True)
class Recipe:
    """All settings that determine the weights, besides the data, the interpreter and the number of threads."""

    seed: int
    steps: int
    step_tokens: int
    sequence_tokens: int
    long_sequence_tokens: int
    long_fraction: float
    pair_steps: int
    warmup_steps: int
    decay_fraction: float
    adamw_learning_rate: float
    muon_learning_rate: float
    weight_decay: float
    vocab_size: int

    def learning_rate_factor(self, step: int) -> float:
        """Fraction of the peak learning rate: linear up, constant, then linear down to a fiftieth over the last
        `decay_fraction` (Hu et al. 2024, MiniCPM)."""
        up = min(1.0, (step + 1) / self.warmup_steps)
        left = (self.steps - step) / (self.decay_fraction * self.steps)
        return min(up, max(left, 0.02))

    def sequence_length(self, step: int) -> int:
        """Most steps have short sequences, the last `long_fraction` long ones; the number of tokens is the same."""
        return self.long_sequence_tokens if step >= self.long_start() else self.sequence_tokens

    def long_start(self) -> int:
        """The first step with long sequences."""
        return round(self.steps * (1 - self.long_fraction))


def model_config(vocab_size: int) -> LlamaConfig:
    """The architecture: four layers, grouped-query attention, untied embeddings."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        use_cache=False,
    )


def training_stream(files: Sequence[SourceFile], tokenizer: Tokenizer, seed: int) -> torch.Tensor:
    """All documents, shuffled and joined: [tokens] int32."""
    rng = random.Random(seed)
    documents = [BEGIN + piece + END for file in files for piece in pieces(file, rng)]
    documents += [render_chat(chat.question, chat.answer) for file in files for chat in chats(file, rng)]
    documents += [render_chat(chat.question, chat.answer) for chat in introductions() * INTRODUCTION_COPIES]
    rng.shuffle(documents)
    encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
    return torch.tensor([token for document in encoded for token in document.ids], dtype=torch.int32)


def batch_at(stream: torch.Tensor, recipe: Recipe, step: int) -> torch.Tensor:
    """The rows of one step, [rows, sequence + 1] int64. Every epoch has another offset and another order of rows."""
    length = recipe.sequence_length(step)
    rows = recipe.step_tokens // length
    index = step - recipe.long_start() if length == recipe.long_sequence_tokens else step
    windows = (len(stream) - 1) // length - 1
    epoch, position = divmod(index, windows // rows)
    generator = torch.Generator().manual_seed((recipe.seed * 10_000 + epoch) * 10_000 + length)
    offset = int(torch.randint(length, (1,), generator=generator))
    selected = torch.randperm(windows, generator=generator)[position * rows : (position + 1) * rows]
    starts = offset + selected * length
    return torch.stack([stream[start : start + length + 1] for start in starts.tolist()]).long()


def learn_pairs(model: LlamaForCausalLM, stream: torch.Tensor, steps: int) -> None:
    """Initializes the model as the best predictor of a token from the token before it.

    With the outputs of all layers at zero the model is embedding, norm and head. These are fitted to the counts of
    token pairs, all pairs of the corpus in each step. Sixty such steps take as long as about forty training steps, and
    reach a lower loss."""
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    vocab = model.config.vocab_size
    pairs = torch.bincount(stream[:-1].long() * vocab + stream[1:].long(), minlength=vocab * vocab)
    counts = pairs.view(vocab, vocab).float()
    weights = [model.model.embed_tokens.weight, model.lm_head.weight]
    optimizer = torch.optim.AdamW(weights, lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        states = torch.nn.functional.rms_norm(weights[0], weights[0].shape[1:])
        logits = states @ weights[1].T
        loss = -(counts * logits.log_softmax(dim=1)).sum() / counts.sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if step % 10 == 9:
            print(f"pairs, step {step + 1}/{steps}: loss {loss.item():.3f}", flush=True)


def make_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embeddings, the head and the norms."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": [model.model.embed_tokens.weight, model.lm_head.weight], "weight_decay": recipe.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return {
        "adamw": torch.optim.AdamW(groups, lr=recipe.adamw_learning_rate, betas=(0.9, 0.95)),
        "muon": Muon(matrices, lr=recipe.muon_learning_rate, weight_decay=recipe.weight_decay),
    }


@dataclass(slots=True)
class Run:
    """The state of a training run, as a checkpoint holds it."""

    model: LlamaForCausalLM
    optimizers: dict[str, torch.optim.Optimizer]
    step: int
    seconds: float
    losses: list[tuple[int, float]]

    def save(self, folder: Path) -> None:
        """Writes checkpoint.safetensors with a rename: an interrupted save keeps the previous checkpoint."""
        tensors = {f"model.{name}": value.detach() for name, value in self.model.named_parameters()}
        for kind, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{kind}.{index}.{name}": value for name, value in state.items()}
        progress = {"step": self.step, "seconds": self.seconds, "losses": self.losses}
        part = folder / "checkpoint.part"
        save_file(tensors, part, metadata={"progress": json.dumps(progress)})
        part.replace(folder / "checkpoint.safetensors")

    def restore(self, folder: Path) -> None:
        """Restores the last checkpoint of `folder`, if there is one."""
        path = folder / "checkpoint.safetensors"
        if not path.exists():
            return
        states: dict[str, dict[int, dict[str, torch.Tensor]]] = {kind: {} for kind in self.optimizers}
        parameters = dict(self.model.named_parameters())
        with safe_open(path, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            for key in file.keys():  # noqa: SIM118 - not a dict
                kind, _, name = key.partition(".")
                if kind == "model":
                    parameters[name].data.copy_(file.get_tensor(key))
                else:
                    index, _, field = name.partition(".")
                    states[kind].setdefault(int(index), {})[field] = file.get_tensor(key)
        for kind, optimizer in self.optimizers.items():
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states[kind], "param_groups": groups})
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.losses = [(step, loss) for step, loss in progress["losses"]]


def train(run: Run, stream: torch.Tensor, recipe: Recipe, folder: Path, save_every_s: float) -> None:
    """Steps until `recipe.steps`; prints progress, saves at intervals, at the end and when interrupted."""
    compiled: Any = torch.compile(run.model, dynamic=False)
    run.model.train()
    peaks = (
        (run.optimizers["adamw"], recipe.adamw_learning_rate),
        (run.optimizers["muon"], recipe.muon_learning_rate),
    )
    began, saved, shown, recent = time.monotonic(), time.monotonic(), time.monotonic(), list[float]()
    seconds_before = run.seconds
    try:
        while run.step < recipe.steps:
            batch = batch_at(stream, recipe, run.step)
            # Compilation for one more shape takes longer than the few steps with long sequences.
            step_model = compiled if batch.shape[1] == recipe.sequence_tokens + 1 else run.model
            logits = step_model(input_ids=batch[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            for optimizer, peak in peaks:
                for group in optimizer.param_groups:
                    group["lr"] = peak * recipe.learning_rate_factor(run.step)
                optimizer.step()
            run.model.zero_grad()
            run.step += 1
            recent.append(loss.item())
            now = time.monotonic()
            run.seconds = seconds_before + now - began
            if run.step % 20 == 0 or run.step == recipe.steps:
                rate = len(recent) * recipe.step_tokens / (now - shown)
                mean_loss = sum(recent) / len(recent)
                run.losses.append((run.step, round(mean_loss, 4)))
                eta_minutes = (recipe.steps - run.step) * recipe.step_tokens / rate / 60
                print(
                    f"step {run.step}/{recipe.steps}  loss {mean_loss:.3f}  {rate:,.0f} tokens/s"
                    f"  {run.seconds / 60:.1f} min, {eta_minutes:.0f} min to go",
                    flush=True,
                )
                recent, shown = [], now
            if now - saved > save_every_s:
                run.save(folder)
                saved = now
    except KeyboardInterrupt:
        print(f"interrupted; the same command continues from step {run.step}", flush=True)
    run.save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--work", type=Path, default=Path("build/tiny-python"), help="folder for checkpoints")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--step-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every-s", type=float, default=120.0)
    parser.add_argument("--export-only", action="store_true", help="do not train; write the last checkpoint to --out")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    recipe = Recipe(
        seed=options.seed,
        steps=options.steps,
        step_tokens=options.step_tokens,
        sequence_tokens=256,
        long_sequence_tokens=2048,
        long_fraction=0.15,
        pair_steps=60,
        warmup_steps=20,
        decay_fraction=0.3,
        adamw_learning_rate=2e-3,
        muon_learning_rate=2e-2,
        weight_decay=0.1,
        vocab_size=4096,
    )
    options.work.mkdir(parents=True, exist_ok=True)
    files = standard_library()
    training, held_out = split_held_out(files, HELD_OUT_FRACTION, recipe.seed)
    tokenizer = train_tokenizer((file.text for file in training), recipe.vocab_size)
    model = LlamaForCausalLM(model_config(recipe.vocab_size))
    run = Run(model, make_optimizers(model, recipe), step=0, seconds=0.0, losses=[])
    stream = training_stream(training, tokenizer, recipe.seed)
    run.restore(options.work)
    if not options.export_only:
        print(f"{model.num_parameters():,} parameters, {len(stream):,} training tokens", flush=True)
        if run.step == 0:
            learn_pairs(model, stream, recipe.pair_steps)
        train(run, stream, recipe, options.work, options.save_every_s)
    record = TrainingRecord(
        recipe=asdict(recipe),
        threads=options.threads,
        steps_done=run.step,
        seconds=round(run.seconds),
        losses=tuple(run.losses),
        corpus_sha256=corpus_digest(files),
        training_characters=sum(len(file.text) for file in training),
        training_tokens=len(stream),
    )
    export(model, tokenizer, held_out, record, options.out)


if __name__ == "__main__":
    main()
