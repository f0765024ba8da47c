"""Reads the tables in `placement/data`, and says what to write instead of a name that is in none of them."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from tandem.core.errors import ConfigError

DATA = Path(__file__).parents[1] / "data"


def read_yaml(name: str) -> Any:
    """The content of `placement/data/<name>`."""
    return yaml.safe_load((DATA / name).read_text("utf-8"))


def find_name(name: str, known: Iterable[str], kind: str) -> str:
    """The entry of `known` that `name` means, whatever its case. Raises ConfigError with the nearest ones."""
    by_folded = {entry.casefold(): entry for entry in known}
    folded = name.casefold()
    if folded in by_folded:
        return by_folded[folded]
    containing = [entry for entry in by_folded if folded in entry]
    near = containing or difflib.get_close_matches(folded, by_folded, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(by_folded[entry] for entry in near)}?" if near else "known are"
    rest = "" if near else " " + ", ".join(by_folded.values())
    raise ConfigError(f"{name!r} is not a known {kind}; {hint}{rest}")
