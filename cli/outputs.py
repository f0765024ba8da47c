"""Files that a command writes when its work is done: checked before it begins."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from tandem.core.errors import ConfigError

_PROBE = b"\0"


def check_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None] | None = None) -> None:
    """Every path of `outputs`, by what it is, can be written as a file, and none is named twice or among `inputs`.
    Nothing is left behind. None: not asked for. Raises ConfigError."""
    taken = {path.resolve(): name for name, path in (inputs or {}).items() if path is not None}
    for name, path in outputs.items():
        if path is None:
            continue
        whole = path.resolve()
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name a file")
        if not path.exists() and not whole.parent.is_dir():
            raise ConfigError(f"the folder {whole.parent} does not exist")
        if whole in taken:
            raise ConfigError(f"{path} would be both {taken[whole]} and {name}; name another file")
        taken[whole] = name
        _try_to_write(path)


def _try_to_write(path: Path) -> None:
    """Permissions alone do not tell of file systems that are read-only or full. A pipe or a device is not tried: that
    may wait."""
    try:
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():
            with tempfile.TemporaryFile(dir=path.resolve().parent, buffering=0) as probe:
                probe.write(_PROBE)  # a full disk still makes empty files
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror})") from error
