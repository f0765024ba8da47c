"""Secrets that a configuration names instead of holding: `file:PATH` or `env:NAME`.

So a configuration can be shown, copied and kept with others, and the secret comes from where an operator keeps secrets.
"""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

from tandem.core.anchored_path import anchor_file
from tandem.core.errors import ConfigError
from tandem.core.input_file import read_input

_FILE, _ENVIRONMENT = "file:", "env:"
_MAX_BYTES = 64 << 10


def _anchor_reference(value: str, info: ValidationInfo) -> str:
    if value.startswith(_FILE):
        return f"{_FILE}{anchor_file(Path(value.removeprefix(_FILE)), info)}"
    return value


def _check_reference(value: str) -> str:
    if not is_reference(value):
        raise ValueError("must have the form file:PATH or env:NAME")
    return value


Secret = Annotated[str, AfterValidator(_anchor_reference)]
"""A secret itself, or the reference of one. Its field needs `repr=False`."""
SecretReference = Annotated[str, AfterValidator(_check_reference), AfterValidator(_anchor_reference)]


def is_reference(secret: str) -> bool:
    return secret.startswith((_FILE, _ENVIRONMENT))


def file_of(secret: str) -> Path | None:
    """The file that a reference names, if it names one."""
    return Path(secret.removeprefix(_FILE)) if secret.startswith(_FILE) else None


def read_secret(secret: str) -> str:
    """The secret itself, without white space around it. Raises ConfigError if a reference leads to nothing."""
    if (path := file_of(secret)) is not None:
        try:
            value = read_input(path, _MAX_BYTES).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ConfigError(f"the secret {secret} cannot be read ({reason})") from error
    elif secret.startswith(_ENVIRONMENT):
        value = os.environ.get(secret.removeprefix(_ENVIRONMENT), "").strip()
    else:
        return secret
    if not value:
        raise ConfigError(f"the secret {secret} is empty or not there")
    return value
