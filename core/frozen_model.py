"""The base of what is read from and written to files."""

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """Immutable. An unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
