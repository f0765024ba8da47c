"""Files and folders with secrets."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.core.errors import ConfigError


def write_private(path: Path, value: Mapping[str, Any]) -> None:
    """Only this user may read the file. It is replaced in one step, so a reader never sees a partial file, and it is on
    the disk when this returns. Raises ConfigError; the file is then as it was."""
    draft = path.with_suffix(".new")
    try:
        draft.unlink(missing_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(value, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written ({error.strerror})") from error


def make_private_folder(folder: Path) -> None:
    """Only this user may look into it. No effect if it exists. Raises ConfigError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot create {folder} ({error.strerror}); set TANDEM_STATE_DIR to a folder where you may write"
        ) from error
