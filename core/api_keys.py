"""The file of API keys: which keys there are, whose they are, and how much each may ask for.

The file holds hashes only: whoever reads it cannot use the API. SHA-256 without salt is enough, because `new_key` makes
keys of 256 random bits, which nobody can find by trying.
"""

import hashlib
import secrets
from datetime import datetime
from typing import Annotated

from pydantic import AwareDatetime, Field, model_validator

from tandem.core.frozen_model import FrozenModel, WrongSetting

_PREFIX = "tandem-"
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class ApiKey(FrozenModel):
    """One key."""

    name: _Name = Field(description="In logs and messages; counts and limits go by it")
    tenant: _Name = Field(description="Whose it is: waiting is fair between tenants, and metrics count by tenant")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the key; `tandem key` prints it")
    expires: AwareDatetime | None = Field(default=None, description="Such as 2027-01-31T00:00:00Z; null: never")
    max_requests: int | None = Field(default=None, ge=1, description="Completion requests in progress at once")
    requests_per_s: float | None = Field(default=None, gt=0, description="Completion requests, on average")
    burst: int = Field(default=10, ge=1, description="Requests that may come at once before requests_per_s counts")
    names_tenants: bool = Field(default=False, description="A gateway's key: its requests may name another tenant")

    def is_expired(self, now: datetime) -> bool:
        return self.expires is not None and now >= self.expires


class ApiKeyFile(FrozenModel):
    keys: tuple[ApiKey, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_different(self) -> "ApiKeyFile":
        for setting in ("name", "sha256"):
            seen: dict[str, int] = {}
            for index, key in enumerate(self.keys):
                value = getattr(key, setting)
                if value in seen:
                    raise WrongSetting(("keys", index, setting), f"is that of keys.{seen[value]} too")
                seen[value] = index
        return self


def new_key() -> str:
    """A key of 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
