"""Reads the tables in `placement/data` and finds entries by name."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from tandem.core.errors import ConfigError

DATA = Path(__file__).parents[1] / "data"


def read_yaml(name: str) -> Any:
    """The content of the file `placement/data/<name>`."""
    return yaml.safe_load((DATA / name).read_text("utf-8"))


def find_name(name: str, known: Iterable[str], kind: str) -> str:
    """The entry of `known` that equals `name` without regard to case. Raises ConfigError with similar names."""
    by_folded = {entry.casefold(): entry for entry in known}
    folded = name.casefold()
    if folded in by_folded:
        return by_folded[folded]
    containing = [entry for entry in by_folded if folded in entry]
    similar = containing or difflib.get_close_matches(folded, by_folded, n=3, cutoff=0.5)
    hint = f"known are {', '.join(by_folded.values())}"
    if similar:
        hint = f"did you mean {' or '.join(by_folded[entry] for entry in similar)}?"
    raise ConfigError(f"{name!r} is not a known {kind}; {hint}")
