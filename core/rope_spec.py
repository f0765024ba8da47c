"""The rotary position embedding of a model, as its checkpoint's config.json describes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from tandem.core.checkpoint_fields import CheckpointFields, shown
from tandem.core.errors import CheckpointError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding. Fields that a kind does not use have a neutral value.

    `original_max_positions` is the context that the model was trained with, before `factor` stretched it.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn, longrope
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()  # longrope

    @classmethod
    def from_fields(cls, fields: CheckpointFields, max_positions: int, head_dim: int) -> "RopeSpec":
        """Both forms of a config.json: `rope_theta` with `rope_scaling`, and the `rope_parameters` of transformers 5.
        Raises CheckpointError."""
        given = fields.raw("rope_scaling", None) or fields.raw("rope_parameters", None) or {}
        if not isinstance(given, Mapping):
            raise CheckpointError("config.json: the RoPE parameters must be an object")
        if any(isinstance(value, Mapping) for value in given.values()):
            raise CheckpointError("config.json: different RoPE parameters for different layers are not supported")
        rope = CheckpointFields(given, inside="the RoPE parameters")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in ("default", "linear", "dynamic", "llama3", "yarn", "longrope"):
            raise CheckpointError(f"config.json: the RoPE type {shown(kind)} is not supported")
        if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
            raise CheckpointError(
                "config.json: rotating only a part of each head (partial_rotary_factor) is not supported"
            )
        original = max_positions
        if kind in ("llama3", "yarn", "longrope"):
            inner = rope.count("original_max_position_embeddings", max_positions)
            original = fields.count("original_max_position_embeddings", inner)
        short, long = rope.numbers("short_factor"), rope.numbers("long_factor")
        if kind == "longrope" and not len(short) == len(long) == head_dim // 2:
            raise CheckpointError(f"config.json: longrope needs {head_dim // 2} short and as many long factors")
        stretched = kind in ("linear", "dynamic", "llama3")
        ratio = max_positions / original
        low_freq_factor = rope.number("low_freq_factor", None if kind == "llama3" else 1.0)
        high_freq_factor = rope.number("high_freq_factor", None if kind == "llama3" else 4.0)
        if kind == "llama3" and low_freq_factor >= high_freq_factor:
            raise CheckpointError(
                f"config.json: the RoPE parameters, 'high_freq_factor' {high_freq_factor} must be above "
                f"'low_freq_factor' {low_freq_factor}"
            )
        if kind == "dynamic" and head_dim < 4:
            raise CheckpointError(f"config.json: dynamic RoPE needs a head_dim of at least 4, not {head_dim}")
        return cls(
            kind=cast(RopeKind, kind),
            theta=rope.number("rope_theta", fields.number("rope_theta", 10000.0)),
            factor=rope.number("factor") if stretched else rope.number("factor", ratio),
            original_max_positions=original,
            low_freq_factor=low_freq_factor,
            high_freq_factor=high_freq_factor,
            attention_factor=rope.optional_number("attention_factor"),
            beta_fast=rope.optional_number("beta_fast") or 32.0,
            beta_slow=rope.optional_number("beta_slow") or 1.0,
            mscale=rope.optional_number("mscale"),
            mscale_all_dim=rope.optional_number("mscale_all_dim"),
            truncate=rope.flag("truncate", True),
            short_factor=short,
            long_factor=long,
        )

    def needs_long_factors(self, max_model_len: int) -> bool:
        """Whether an engine for sequences of up to `max_model_len` tokens takes longrope's long factors for all."""
        return self.kind == "longrope" and max_model_len > self.original_max_positions
