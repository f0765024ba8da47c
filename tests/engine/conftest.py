"""Small random checkpoints of every family, written by transformers itself, and the reference model of each."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.logging import disable_progress_bar

from tandem.engine.ops.native_library import NativeUnavailableError, load_native_library

_SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # large enough for logits that differ clearly
}
_HALF_HEAD = 8


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SMALL),
    "llama-biases-tied": LlamaConfig(**_SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-head-dim": LlamaConfig(**_SMALL, head_dim=24),
    "llama-multi-head": LlamaConfig(**{**_SMALL, "num_key_value_heads": 4}),
    "llama-linear": LlamaConfig(**_SMALL, **_rope("linear", factor=4.0)),
    "llama-dynamic": LlamaConfig(**_SMALL, **_rope("dynamic", factor=2.0)),
    "llama-llama3": LlamaConfig(
        **_SMALL,
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-yarn": LlamaConfig(**_SMALL, **_rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama-yarn-mscale": LlamaConfig(
        **_SMALL,
        **_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            mscale=0.7,
            mscale_all_dim=0.5,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        ),
    ),
    "llama-longrope": LlamaConfig(
        **_SMALL,
        **_rope(
            "longrope",
            short_factor=[1.0 + 0.1 * i for i in range(_HALF_HEAD)],
            long_factor=[2.0 + 0.3 * i for i in range(_HALF_HEAD)],
            factor=2.0,
            original_max_position_embeddings=256,
        ),
    ),
    "mistral": MistralConfig(**_SMALL, sliding_window=None),
    "mistral-window": MistralConfig(**_SMALL, sliding_window=19),
    "qwen2": Qwen2Config(**_SMALL),
    "qwen2-window": Qwen2Config(**_SMALL, use_sliding_window=True, sliding_window=11, max_window_layers=1),
    "qwen3": Qwen3Config(**_SMALL, head_dim=32, tie_word_embeddings=True),
    "qwen3-window": Qwen3Config(
        **_SMALL,
        head_dim=16,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "opt": OPTConfig(
        vocab_size=300,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        init_std=0.15,
    ),
    "opt-no-bias-untied": OPTConfig(
        vocab_size=300,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        init_std=0.15,
        enable_bias=False,
        tie_word_embeddings=False,
    ),
}


@dataclass(frozen=True)
class Reference:
    """A checkpoint on disk, and what transformers computes from it."""

    path: Path
    model: PreTrainedModel
    _answers: dict[tuple[tuple[int, ...], int], list[int]] = field(default_factory=dict)

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """float32 [tokens, vocab]"""
        logits = self.model(torch.tensor([token_ids])).logits[0]
        assert isinstance(logits, torch.Tensor)
        return logits.float()

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Computed once for all tests that ask for it."""
        key = (tuple(prompt), num_tokens)
        if key not in self._answers:
            self._answers[key] = self._generate(prompt, num_tokens)
        return self._answers[key]

    @torch.inference_mode()
    def _generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        token_ids = torch.tensor([prompt])
        result = self.model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        ids: list[int] = result[0, len(prompt) :].tolist()
        return ids


def write_checkpoint(config: PreTrainedConfig, path: Path, **options: Any) -> Reference:
    """A checkpoint with random weights, biases and norms included, so that no term of the model can be forgotten."""
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1, alpha=1.0)
            assert not parameter.isnan().any(), name
    model.save_pretrained(path, **options)
    return Reference(path, model)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()


class Checkpoints:
    """Makes each checkpoint when it is first asked for."""

    def __init__(self, folder: Path, max_positions: int) -> None:
        self._folder = folder
        self._max_positions = max_positions
        self._made: dict[str, Reference] = {}

    def __getitem__(self, name: str) -> Reference:
        if name not in self._made:
            config = copy.deepcopy(CONFIGS[name])
            config.max_position_embeddings = self._max_positions
            self._made[name] = write_checkpoint(config, self._folder / name)
        return self._made[name]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"), max_positions=256)


@pytest.fixture(scope="session")
def long_checkpoints(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Checkpoints:
    """The same with a context of 2,048 tokens."""
    return Checkpoints(tmp_path_factory.mktemp("long_checkpoints"), max_positions=2048)


@pytest.fixture(scope="module", params=["torch", "native"])
def ops(request: pytest.FixtureRequest) -> str:
    """Both ways to compute; the native one only where there is a compiler."""
    if request.param == "native":
        try:
            load_native_library()
        except NativeUnavailableError as error:
            pytest.skip(str(error))
    return str(request.param)
