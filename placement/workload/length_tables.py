"""Measured lengths in CSV files: of one quantity, or of prompts and outputs together."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tandem.core.errors import ConfigError
from tandem.placement.workload.requests import Floats, Ints
from tandem.placement.workload.rows import (
    OUTPUT_COLUMNS,
    PROMPT_COLUMNS,
    RowFields,
    column,
    csv_table,
    open_text,
    reading,
)

_KIND = "a table of lengths is CSV"


@dataclass(frozen=True, slots=True)
class LengthTable:
    """Intervals of lengths, both ends included: [n] each. `ends` [n]: running sum of their weights."""

    first: Ints
    last: Ints
    ends: Floats

    def sample(self, uniform: Floats) -> Ints:
        """All lengths of an interval are equally probable."""
        rows, within = _select(self.ends, uniform)
        spread = self.last[rows] - self.first[rows] + 1
        lengths: Ints = self.first[rows] + np.minimum((within * spread).astype(np.int64), spread - 1)
        return lengths


@dataclass(frozen=True, slots=True)
class PairTable:
    """Prompt and output tokens: `pairs` [n, 2]. `ends` [n]: running sum of the weights of the rows."""

    pairs: Ints
    ends: Floats

    def sample(self, uniform: Floats) -> Ints:
        """`uniform` [m, 2] -> [m, 2]: rows, with replacement, so prompt and output lengths stay correlated."""
        rows, _ = _select(self.ends, uniform[:, 0])
        return self.pairs[rows]


def read_table(path: Path) -> LengthTable:
    """A table with the columns tokens, or tokens_from and tokens_to, and optionally weight. Raises ConfigError with
    file and line."""
    with reading(path, _KIND), open_text(path) as lines:
        return parse_table(path, lines)


def parse_table(path: Path, lines: Iterable[str]) -> LengthTable:
    """As `read_table`. `path` is for messages."""
    with csv_table(path, lines) as reader:
        columns = reader.fieldnames or ()
        first = column(path, columns, ("tokens", "tokens_from"))
        last = first if first == "tokens" else column(path, columns, ("tokens_to",))
        rows = []
        for fields in _rows(path, reader):
            low, high = fields.tokens(first, minimum=1), fields.tokens(last, minimum=1)
            if high < low:
                raise fields.wrong(last, f"at least {first} {low}", high)
            rows.append((low, high, _weight(fields, columns)))
    lows, highs, ends = _columns(path, rows)
    return LengthTable(lows, highs, ends)


def read_pairs(path: Path) -> PairTable:
    """A table with the columns prompt_tokens and output_tokens, and optionally weight. Raises ConfigError with file and
    line."""
    with reading(path, _KIND), open_text(path) as lines:
        return parse_pairs(path, lines)


def parse_pairs(path: Path, lines: Iterable[str]) -> PairTable:
    """As `read_pairs`. `path` is for messages."""
    with csv_table(path, lines) as reader:
        columns = reader.fieldnames or ()
        prompt, output = column(path, columns, PROMPT_COLUMNS), column(path, columns, OUTPUT_COLUMNS)
        rows = [
            (fields.tokens(prompt, minimum=1), fields.tokens(output, minimum=1), _weight(fields, columns))
            for fields in _rows(path, reader)
        ]
    prompts, outputs, ends = _columns(path, rows)
    return PairTable(np.stack([prompts, outputs], axis=1), ends)


def _rows(path: Path, reader: "csv.DictReader[str]") -> Iterator[RowFields]:
    for values in reader:
        yield RowFields(f"{path} line {reader.line_num}", values)


def _weight(fields: RowFields, columns: Sequence[str]) -> float:
    return fields.number("weight") if "weight" in columns else 1.0


def _columns(path: Path, rows: Sequence[tuple[int, int, float]]) -> tuple[Ints, Ints, Floats]:
    kept = [row for row in rows if row[2] > 0]
    if not kept:
        raise ConfigError(f"{path} holds no lengths" + (" with a weight above 0" if rows else ""))
    one, other = (np.array([row[i] for row in kept], dtype=np.int64) for i in (0, 1))
    return one, other, np.cumsum([row[2] for row in kept])


def _select(ends: Floats, uniform: Floats) -> tuple[Ints, Floats]:
    """Rows by their weights, and each number's position in [0, 1) within the weight of its row."""
    scaled = uniform * ends[-1]
    rows: Ints = np.minimum(np.searchsorted(ends, scaled, side="right"), len(ends) - 1)
    begins = np.concatenate([[0.0], ends[:-1]])[rows]
    return rows, (scaled - begins) / (ends[rows] - begins)
