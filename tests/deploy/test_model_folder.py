"""What is checked of a model before processes start."""

from pathlib import Path
from typing import Any

import pytest

from tandem.core.config import ServeConfig
from tandem.core.errors import ConfigError
from tandem.core.model_spec import ModelSpec
from tandem.deploy.model_folder import check_pairs


def _spec(**rope: Any) -> ModelSpec:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 100}
    return ModelSpec.from_config_json(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "vocab_size": 300,
            "max_position_embeddings": 400,
            "rope_scaling": {**factors, **rope},
        }
    )


def _config(prefill: int | None, decode: int | None) -> ServeConfig:
    sections = {
        role: {"engine": {"max_model_len": length}} for role, length in (("prefill", prefill), ("decode", decode))
    }
    return ServeConfig.model_validate({"model": Path("model"), **sections})


@pytest.mark.parametrize(("prefill", "decode"), [(100, None), (200, 50)])
def test_a_pair_that_would_rotate_keys_differently_is_refused_before_the_start(
    prefill: int | None, decode: int | None
) -> None:
    with pytest.raises(ConfigError, match="must be on one side of 100"):
        check_pairs(_config(prefill, decode), _spec(rope_type="longrope"))
    check_pairs(_config(prefill, decode), _spec(rope_type="linear", factor=2.0))


@pytest.mark.parametrize(("prefill", "decode"), [(100, 50), (200, None), (None, None)])
def test_pairs_with_equal_factors_are_taken(prefill: int | None, decode: int | None) -> None:
    check_pairs(_config(prefill, decode), _spec(rope_type="longrope"))
