"""Traces of real traffic: arrival times, lengths and shared prefixes of requests.

Two formats, plain or .gz:

    CSV         a header with arrival_s (or Azure's TIMESTAMP), prompt_tokens (or input_tokens, ContextTokens),
                output_tokens (or GeneratedTokens), optionally slo_class with the name of an SLO class
    JSON lines  Mooncake's: timestamp [ms], input_length, output_length, optionally hash_ids

A TIMESTAMP without a time zone is UTC. Requests without output tokens (refused or cancelled ones) are left out.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import numpy as np

from tandem.core.errors import ConfigError
from tandem.core.slo import SloClass
from tandem.placement.workload.prefix_tree import prefix_groups
from tandem.placement.workload.requests import RequestStream

_PROMPT_COLUMNS = ("prompt_tokens", "input_tokens", "ContextTokens")
_OUTPUT_COLUMNS = ("output_tokens", "GeneratedTokens")
_MAX_TOKENS = 1 << 31
_MAX_DIGITS = 400


@dataclass(frozen=True, slots=True)
class Trace:
    """`has_classes`: the file names the SLO class of each request; without names, all requests have class 0.
    `num_without_output`: requests of the file that are left out."""

    requests: RequestStream
    has_classes: bool
    num_without_output: int


@dataclass(frozen=True, slots=True)
class _Row:
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    slo_class: int = 0
    blocks: tuple[int, ...] = ()


def load_trace(path: Path) -> RequestStream:
    """The requests of a trace in order of arrival, the first at 0. Raises ConfigError with file and line."""
    return read_trace(path, ()).requests


def read_trace(path: Path, classes: Sequence[SloClass]) -> Trace:
    """Like `load_trace`. `classes` resolve the names in the column slo_class; without classes the column is ignored."""
    try:
        with _open(path) as file:
            rows, has_classes = _read_json_lines(path, file) if _is_json_lines(path) else _read_csv(path, file, classes)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is not a complete .gz file ({error})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text; a trace is CSV or JSON lines") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    served = sorted((row for row in rows if row.output_tokens), key=lambda row: row.arrival_s)  # stable
    if not served:
        raise ConfigError(f"{path} holds no requests" + (" with output tokens" if rows else ""))
    return Trace(_as_stream(path, served), has_classes, len(rows) - len(served))


def _as_stream(path: Path, rows: Sequence[_Row]) -> RequestStream:
    prompts = np.array([row.prompt_tokens for row in rows], dtype=np.int64)
    groups = tokens = None
    if any(row.blocks for row in rows):
        try:
            groups, tokens = prefix_groups([row.blocks for row in rows], prompts)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
    arrival_s = np.array([row.arrival_s for row in rows])
    return RequestStream.make(
        arrival_s - arrival_s[0],
        prompts,
        np.array([row.output_tokens for row in rows], dtype=np.int64),
        slo_class=np.array([row.slo_class for row in rows], dtype=np.int64),
        prefix_group=groups,
        prefix_tokens=tokens,
    )


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _is_json_lines(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((".jsonl", ".json"))


def _read_csv(path: Path, file: TextIO, classes: Sequence[SloClass]) -> tuple[list[_Row], bool]:
    reader = csv.DictReader(file)
    columns = reader.fieldnames or ()
    arrival = _column(path, columns, ("arrival_s", "TIMESTAMP"))
    prompt, output = _column(path, columns, _PROMPT_COLUMNS), _column(path, columns, _OUTPUT_COLUMNS)
    has_classes = "slo_class" in columns and len(classes) > 0
    class_index = {slo.name: index for index, slo in enumerate(classes)}
    rows = []
    try:
        for values in reader:
            fields = _RowFields(f"{path} line {reader.line_num}", values)
            rows.append(
                _Row(
                    fields.timestamp_s(arrival) if arrival == "TIMESTAMP" else fields.seconds(arrival),
                    fields.tokens(prompt, minimum=1),
                    fields.tokens(output, minimum=0),
                    fields.slo_class("slo_class", class_index) if has_classes else 0,
                )
            )
    except csv.Error as error:
        raise ConfigError(f"{path} line {reader.line_num}: is not CSV ({error})") from error
    return rows, has_classes


def _read_json_lines(path: Path, file: TextIO) -> tuple[list[_Row], bool]:
    rows = []
    for where, values in _json_objects(path, file):
        fields = _RowFields(where, values)
        rows.append(
            _Row(
                fields.seconds("timestamp") / 1000.0,
                fields.tokens("input_length", minimum=1),
                fields.tokens("output_length", minimum=0),
                blocks=fields.block_ids("hash_ids"),
            )
        )
    return rows, False


def _json_objects(path: Path, file: TextIO) -> Iterator[tuple[str, Mapping[str, object]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: is not a JSON object; write one object a line")
        yield where, values


def _column(path: Path, columns: Sequence[str], names: Sequence[str]) -> str:
    for name in names:
        if name in columns:
            return name
    present = f"only {', '.join(columns)!r:.200}" if columns else "the file is empty"
    raise ConfigError(f"{path} line 1: there is no column {names[0]}{',' if columns else ';'} {present}")


class _RowFields:
    """One row. All methods raise ConfigError with file, line and field for a value of the wrong kind."""

    def __init__(self, where: str, values: Mapping[str, object]) -> None:
        self._where = where
        self._values = values

    def seconds(self, name: str) -> float:
        value = self._values.get(name)
        try:
            number = float(value) if isinstance(value, (str, int, float)) else -1.0
        except (ValueError, OverflowError):
            number = -1.0
        if isinstance(value, bool) or not 0 <= number < 1e12:
            raise self._wrong(name, "a number of at least 0", value)
        return number

    def timestamp_s(self, name: str) -> float:
        """A date and time as seconds since 1970."""
        value = self._values.get(name)
        try:
            moment = datetime.fromisoformat(str(value))
        except ValueError as error:
            raise self._wrong(name, "a date and time, e.g. 2023-11-16 18:15:46.680590", value) from error
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()

    def tokens(self, name: str, *, minimum: int) -> int:
        value = self._values.get(name)
        is_number = isinstance(value, str) and value.strip().isdecimal() and len(value) < _MAX_DIGITS
        number = int(value) if is_number else value  # type: ignore[call-overload]
        if isinstance(number, bool) or not isinstance(number, int) or not minimum <= number < _MAX_TOKENS:
            raise self._wrong(name, f"a whole number of at least {minimum}", value)
        return number

    def slo_class(self, name: str, class_index: Mapping[str, int]) -> int:
        value = self._values.get(name)
        if not isinstance(value, str) or value not in class_index:
            raise self._wrong(name, f"one of the SLO classes {', '.join(class_index)}", value)
        return class_index[value]

    def block_ids(self, name: str) -> tuple[int, ...]:
        value = self._values.get(name, [])
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self._wrong(name, "a list of whole numbers", value)
        return tuple(value)

    def _wrong(self, name: str, expected: str, value: object) -> ConfigError:
        shown = "missing" if value is None else f"{value!r}"
        return ConfigError(f"{self._where}: {name} must be {expected}, not {shown[:60]}")
