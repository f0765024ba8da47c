"""Writes tiny-python as a Hugging Face model folder, with its measured loss and its model card.

The card is made from training.json alone (`python -m models.export_tiny_python FOLDER` makes it again), so that its
figures are those of the record.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from tandem.models.stdlib_corpus import SourceFile
from tandem.models.tiny_tokenizer import ASSISTANT, BEGIN, END, USER, write_tokenizer

CODE_PROMPT = "def read_json(path):"
CHAT_QUESTION = "Write a function is_even that returns True if the number is even."


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """A training run, without the measured result. `losses` are (step, nats per token) of the training."""

    recipe: dict[str, Any]
    threads: int
    steps_done: int
    seconds: int
    losses: tuple[tuple[int, float], ...]
    corpus_sha256: str
    training_characters: int
    training_tokens: int


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """The loss on files outside the training data, in windows of `context_tokens`."""

    context_tokens: int
    tokens: int
    nats_per_token: float
    perplexity: float
    bits_per_byte: float


@torch.no_grad()
def held_out_loss(
    model: LlamaForCausalLM, tokenizer: Tokenizer, texts: Sequence[str], context_tokens: int
) -> HeldOutLoss:
    """The mean loss over all tokens of `texts`. Each text is split into independent windows."""
    nats, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text).ids)
        for start in range(0, len(ids) - 1, context_tokens):
            window = ids[start : start + context_tokens + 1]
            logits = model(input_ids=window[None, :-1]).logits[0].float()
            nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
            tokens += len(window) - 1
    size_bytes = sum(len(text.encode()) for text in texts)
    mean = nats / tokens
    return HeldOutLoss(
        context_tokens=context_tokens,
        tokens=tokens,
        nats_per_token=round(mean, 4),
        perplexity=round(math.exp(mean), 2),
        bits_per_byte=round(nats / math.log(2) / size_bytes, 4),
    )


@torch.no_grad()
def greedy(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, max_tokens: int) -> str:
    """The greedy continuation of `prompt`, whose special tokens are encoded as such. Ends before `END`."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    for _ in range(max_tokens):
        token_id = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token_id == tokenizer.token_to_id(END):
            break
        ids.append(token_id)
    return str(tokenizer.decode(ids))


def export(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    held_out: Sequence[SourceFile],
    record: TrainingRecord,
    folder: Path,
) -> None:
    """Rounds the weights to bf16, measures the rounded model, and writes all files of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
    model.to(torch.float32)
    texts = [file.text for file in held_out]
    chat_prompt = f"{BEGIN}{USER}{CHAT_QUESTION}{END}{ASSISTANT}"
    chat_text = greedy(model, tokenizer, chat_prompt, 96)
    facts = {
        **asdict(record),
        "parameters": model.num_parameters(),
        "context_tokens": model.config.max_position_embeddings,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "held_out": [asdict(held_out_loss(model, tokenizer, texts, length)) for length in (512, 2048)],
        "held_out_by_file": {
            file.name: held_out_loss(model, tokenizer, [file.text], 512).nats_per_token for file in held_out
        },
        "sample": greedy(model, tokenizer, BEGIN + CODE_PROMPT, 64),
        "chat_question": CHAT_QUESTION,
        "chat_answer": chat_text.removeprefix(CHAT_QUESTION),
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    write_card(folder)


def write_card(folder: Path) -> None:
    """Makes README.md of `folder` from its training.json."""
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")


def model_card(facts: dict[str, Any]) -> str:
    """The model card as Markdown, with the header that Hugging Face expects."""
    recipe = facts["recipe"]
    loss_rows = "\n".join(
        f"| {row['context_tokens']} | {row['nats_per_token']:.3f} | {row['perplexity']:.2f} "
        f"| {row['bits_per_byte']:.3f} |"
        for row in facts["held_out"]
    )
    losses = facts["losses"]
    chosen = losses[:: max(1, len(losses) // 8)] + losses[-1:]
    curve = ", ".join(f"{loss:.2f} at {step}" for step, loss in chosen)
    trained_tokens = facts["steps_done"] * recipe["step_tokens"]
    paragraphs = {
        "what": f"""A language model of the Llama architecture with {facts["parameters"]:,} parameters, trained on the
            Python standard library only. It exists so that a serving system can be tried with a real model that fits
            in a repository: its weights are {facts["parameters"] * 2 / 1e6:.0f} MB in bf16, it runs on any laptop, and
            its output is recognisable as Python. It is not a coding assistant.""",
        "data": f"""The source of the standard library of Python {facts["python"]} without tests, generated tables and
            copies ({facts["training_characters"]:,} characters for training), under the Python Software Foundation
            License Version 2, which also applies to passages that the model may reproduce. About a fifth of the
            training tokens are short chats made from documented functions ("Write a function ... that ..." and the
            source), and a few sentences in which the model introduces itself. {len(facts["held_out_by_file"])} files,
            drawn with the seed, were held out. SHA-256 of the corpus: `{facts["corpus_sha256"]}`.""",
        "training": f"""{facts["steps_done"]:,} steps of {recipe["step_tokens"]:,} tokens,
            {trained_tokens / 1e6:.1f} million in all ({trained_tokens / facts["training_tokens"]:.1f} epochs), in
            {facts["seconds"] / 60:.0f} minutes (threads: {facts["threads"]}) on a CPU that was not idle; seed
            {recipe["seed"]}, torch {facts["torch"]}, fp32. Embedding and head were first fitted to the counts of
            token pairs ({recipe["pair_steps"]} steps over all of them); then Muon for the matrices of the layers and
            AdamW for the rest.
            Sequences of {recipe["sequence_tokens"]} tokens, in the last {recipe["long_fraction"]:.0%} of the steps of
            {recipe["long_sequence_tokens"]:,}. Training loss in nats per token: {curve}.""",
        "limits": f"""It knows the form of Python, not its meaning: names are plausible, programs seldom work. Chats
            have one question and one answer: "Write a function NAME that DOES SOMETHING." gets a function, most other
            messages get the introduction. The context is {facts["context_tokens"]:,} tokens; training sequences had
            at most {recipe["long_sequence_tokens"]:,}. The training data has hardly any text in languages other than
            Python and English.""",
    }
    filled = {name: textwrap.fill(" ".join(text.split()), width=118) for name, text in paragraphs.items()}
    return f"""---
license: psf-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [llama, code, python]
---

# tiny-python

{filled["what"]}

## Data

{filled["data"]}

## Training

    python -m models.train_tiny_python --out models/tiny-python --steps {recipe["steps"]} \\
        --step-tokens {recipe["step_tokens"]} --seed {recipe["seed"]} --threads {facts["threads"]}

{filled["training"]}

## Held-out loss

Of the bf16 weights, computed in fp32, over all {facts["held_out"][0]["tokens"]:,} tokens of the held-out files:

| Window (tokens) | Nats per token | Perplexity | Bits per byte |
|---|---|---|---|
{loss_rows}

## What it writes

Greedy, from `{CODE_PROMPT}`:

```python
{facts["sample"].rstrip()}
```

Greedy, to the chat message "{facts["chat_question"]}":

```python
{facts["chat_answer"].rstrip()}
```

## Limits

{filled["limits"]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the model card of FOLDER again from its training.json.")
    parser.add_argument("folder", type=Path)
    write_card(parser.parse_args().folder)


if __name__ == "__main__":
    main()
