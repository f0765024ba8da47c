"""The number formats in which a server stores weights and KV, if they differ from the checkpoint's."""

from typing import Literal

from pydantic import Field

from tandem.core.frozen_model import FrozenModel


class Precision(FrozenModel):
    """Embeddings, output head and activations outside of matrix products keep the checkpoint's format."""

    weights: Literal["fp8", "int4"] | None = Field(
        default=None, description="Of the layers; with fp8, products are computed in fp8; default: the checkpoint's"
    )
    kv: Literal["fp8"] | None = Field(default=None, description="Of the KV cache; default: the checkpoint's")


AS_STORED = Precision()
"""All numbers are those of the checkpoint."""
