"""In which numbers a server stores what its checkpoint has in others."""

from typing import Literal

from pydantic import Field

from tandem.core.frozen_model import FrozenModel


class Precision(FrozenModel):
    """Embeddings and head, and activations outside of products, stay as in the checkpoint."""

    weights: Literal["fp8", "int4"] | None = Field(
        default=None, description="Of the layers; with fp8, products are computed in fp8; default: the checkpoint's"
    )
    kv: Literal["fp8"] | None = Field(default=None, description="Of the KV cache; default: the checkpoint's")


AS_STORED = Precision()
"""All numbers are those of the checkpoint."""
