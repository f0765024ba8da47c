"""Tables of rotary position embeddings, for every kind of RoPE that a checkpoint may have.

Row p of a table holds the cosines and sines of position p. A cached key is not rotated again, so the kinds whose
frequencies depend on the sequence's length depend on the position alone here:

- dynamic: position p has the frequencies of a sequence that ends at p. A prompt within the trained context, and every
  generated token after it, gets the same rotation as in Hugging Face.
- longrope: the long factors for all positions if the engine serves sequences beyond the trained context, else the
  short ones. So KV of engines that differ in this does not fit together: `KvLayout.rope_factors` tells them apart.
"""

import math

import torch
from torch import Tensor

from tandem.core.errors import CheckpointError
from tandem.core.rope_spec import RopeSpec


def difference_from_transformers(rope: RopeSpec, max_model_len: int) -> str | None:
    """A sentence where a cached key cannot have the rotation that transformers gives it in a longer sequence."""
    trained = rope.original_max_positions
    if max_model_len <= trained or rope.kind not in ("dynamic", "longrope"):
        return None
    difference = (
        f"prompts beyond {trained} tokens are rotated by each token's position, not by the prompt's length"
        if rope.kind == "dynamic"
        else f"all sequences get the long factors, those of up to {trained} tokens too"
    )
    return f"{rope.kind} RoPE: {difference}, unlike in transformers; max_model_len {trained} avoids it"


def cos_sin_table(rope: RopeSpec, head_dim: int, max_positions: int, use_long_factors: bool) -> Tensor:
    """float32 [max_positions, head_dim]: the cosines of head_dim/2 angles, then their sines.

    Raises CheckpointError for parameters whose result is not a number.
    """
    try:
        table = _compute_table(rope, head_dim, max_positions, use_long_factors)
        is_finite = bool(torch.stack(table.aminmax()).isfinite().all())
    except (ArithmeticError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"config.json: {rope.kind} RoPE cannot be computed from its parameters") from error
    if not is_finite:
        raise CheckpointError(f"config.json: {rope.kind} RoPE has rotations that are not numbers; check its parameters")
    return table


def _compute_table(rope: RopeSpec, head_dim: int, max_positions: int, use_long_factors: bool) -> Tensor:
    positions = torch.arange(max_positions, dtype=torch.float32)
    scale = 1.0
    if rope.kind == "dynamic":
        angles = positions.unsqueeze(1) * _dynamic_frequencies(rope, head_dim, max_positions)
    elif rope.kind == "yarn":
        angles = torch.outer(positions, _yarn_frequencies(rope, head_dim))
        scale = _yarn_scale(rope)
    elif rope.kind == "longrope":
        angles = torch.outer(positions, _longrope_frequencies(rope, head_dim, use_long_factors))
        scale = _longrope_scale(rope)
    else:
        frequencies = _frequencies(rope.theta, head_dim)
        if rope.kind == "linear":
            frequencies = frequencies / rope.factor
        elif rope.kind == "llama3":
            frequencies = _llama3_frequencies(rope, frequencies)
        angles = torch.outer(positions, frequencies)
    return torch.cat((angles.cos() * scale, angles.sin() * scale), dim=1)


def _frequencies(theta: float | Tensor, head_dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _dynamic_frequencies(rope: RopeSpec, head_dim: int, max_positions: int) -> Tensor:
    """[max_positions, head_dim / 2]: NTK-aware scaling (u/bloc97, u/emozilla)."""
    lengths = torch.arange(1, max_positions + 1, dtype=torch.float32).clamp(min=rope.original_max_positions)
    stretch = rope.factor * lengths / rope.original_max_positions - (rope.factor - 1)
    return _frequencies((rope.theta * stretch ** (head_dim / (head_dim - 2))).unsqueeze(1), head_dim)


def _llama3_frequencies(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """[head_dim / 2]: long wavelengths are stretched, short ones kept, the rest interpolated (Llama 3.1)."""
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies


def _yarn_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """[head_dim / 2]: YaRN (Peng et al. 2023, arXiv 2309.00071), a ramp between interpolated and kept frequencies."""

    def dimension_of(turns: float) -> float:
        context = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(context) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    frequencies = _frequencies(rope.theta, head_dim)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


def _yarn_scale(rope: RopeSpec) -> float:
    """The factor of cosines and sines, so that its square scales the attention's logits."""

    def magnitude(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _longrope_frequencies(rope: RopeSpec, head_dim: int, use_long_factors: bool) -> Tensor:
    factors = rope.long_factor if use_long_factors else rope.short_factor
    return _frequencies(rope.theta, head_dim) / torch.tensor(factors, dtype=torch.float32)


def _longrope_scale(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_positions))
