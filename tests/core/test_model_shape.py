"""Weights, KV and activations of one rank."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.model_shape import MlaShape, ModelShape, MoeShape
from tandem.core.model_spec import ModelSpec
from tandem.core.parallel import ParallelShape

_DENSE = ModelShape("dense", 8, 256, 8, 4, 32, 1024, 1000, 4096)
_MOE = ModelShape("moe", 8, 256, 8, 4, 32, 1024, 1000, 4096, moe=MoeShape(16, 2, 128, num_shared=1, dense_layers=2))
_MLA = ModelShape("mla", 8, 256, 8, 8, 48, 1024, 1000, 4096, mla=MlaShape(64, 16, 32, 32))
_SHAPES = [ParallelShape(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 3, 8)]


def test_weights_of_a_dense_layer() -> None:
    attention = 256 * 32 * (8 + 8 + 4 + 4)
    assert _DENSE.layer_weights == 8 * (attention + 3 * 256 * 1024)
    assert _DENSE.num_parameters == _DENSE.layer_weights + 2 * 1000 * 256


def test_a_mixture_has_all_experts_in_memory() -> None:
    expert = 3 * 256 * 128
    assert _MOE.moe_layer_weights == 17 * expert + 256 * 16
    assert _DENSE.moe_layer_weights == 0


@pytest.mark.parametrize("model", [_DENSE, _MOE, _MLA], ids=lambda model: model.name)
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_all_ranks_together_hold_the_model(model: ModelShape, shape: ParallelShape) -> None:
    assert model.weight_bytes_per_rank(shape) * shape.num_ranks >= model.weight_bytes * model.num_parameters * 0.999
    assert model.kv_bytes_per_token_and_rank(shape) * shape.num_ranks >= model.kv_bytes_per_token
    assert model.weight_bytes_per_rank(ParallelShape()) == model.weight_bytes * model.num_parameters


def test_only_experts_are_divided_over_ranks_with_sequences_of_their_own() -> None:
    expert, shape = 3 * 256 * 128, ParallelShape(dp=4)
    moved = 2.0 * 6 * 12 * expert
    assert _MOE.weight_bytes_per_rank(shape) == _MOE.weight_bytes_per_rank(ParallelShape()) - moved
    assert _MOE.kv_bytes_per_token_and_rank(shape) == _MOE.kv_bytes_per_token / 4
    assert _MOE.allows(shape)
    assert not _MOE.allows(ParallelShape(dp=3))
    assert not _DENSE.allows(shape)


def test_embeddings_and_head_stay_as_they_are() -> None:
    layers, tables = _DENSE.layer_weights, 2 * 1000 * 256
    assert replace(_DENSE, weight_bytes=1.0).weight_bytes_per_rank(ParallelShape()) == layers + 2.0 * tables


def test_the_fullest_stage_of_a_mixture_has_no_dense_layers() -> None:
    """8 layers, 2 of them dense, over 2 stages: the second stage has 4 mixtures."""
    tables = 256 * 1000
    fullest = 4 * (_MOE.attention_weights + _MOE.moe_layer_weights) + tables
    assert _MOE.weight_bytes_per_rank(ParallelShape(1, 2)) == 2.0 * fullest


def test_latents_are_copied_to_every_tp_rank_and_kv_heads_are_not_split() -> None:
    assert _MLA.kv_bytes_per_token_and_rank(ParallelShape(8)) == _MLA.kv_bytes_per_token == 8 * (64 + 16) * 2
    assert _DENSE.kv_bytes_per_token_and_rank(ParallelShape(4)) == _DENSE.kv_bytes_per_token / 4
    assert _DENSE.kv_bytes_per_token_and_rank(ParallelShape(8)) == _DENSE.kv_bytes_per_token / 4


def test_which_shapes_are_legal() -> None:
    assert all(_DENSE.allows(ParallelShape(tp)) for tp in (1, 2, 4, 8))
    assert not _DENSE.allows(ParallelShape(3))
    assert not _DENSE.allows(ParallelShape(1, 9))


@given(tokens=st.integers(0, 1 << 16), sampled=st.integers(0, 512), more=st.integers(1, 100))
def test_activations_grow_with_the_step_and_shrink_with_tp(tokens: int, sampled: int, more: int) -> None:
    def needed(tp: int, tokens: int, sampled: int) -> float:
        return _MOE.activation_bytes_per_rank(ParallelShape(tp), tokens, sampled)

    assert needed(1, tokens + more, sampled) > needed(1, tokens, sampled)
    assert needed(1, tokens, sampled + more) > needed(1, tokens, sampled)
    assert needed(2, tokens, sampled) <= needed(1, tokens, sampled)


def test_a_checkpoint_has_the_shape_of_its_config() -> None:
    spec = ModelSpec.from_config_json(
        {
            "architectures": ["OPTForCausalLM"],
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 300,
            "max_position_embeddings": 128,
        }
    )
    shape = ModelShape.from_spec("opt", spec, 4)
    assert (shape.gated_mlp, shape.tied_embeddings, shape.head_dim, shape.weight_bytes) == (False, True, 16, 4.0)
    assert shape.num_parameters == pytest.approx(spec.num_parameters, rel=0.05)  # norms and biases are left out
