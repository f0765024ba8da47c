"""Traces of real traffic: arrival times, lengths and shared prefixes of requests.

Two formats, plain or .gz:

    CSV         a header with arrival_s (or Azure's TIMESTAMP), prompt_tokens (or input_tokens, ContextTokens),
                output_tokens (or GeneratedTokens), optionally slo_class with the name of an SLO class
    JSON lines  Mooncake's: timestamp [ms], input_length, output_length, optionally hash_ids

A TIMESTAMP without a time zone is UTC. Requests without output tokens (refused or cancelled ones) are left out. Rows
may be in any order. Whole columns are converted at once; only a file with a value that this does not take is read row
by row, for other spellings of numbers and for the line of a mistake.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem.core.errors import ConfigError
from tandem.core.slo import SloClass
from tandem.placement.workload.prefix_tree import prefix_groups
from tandem.placement.workload.requests import Floats, Ints, RequestStream
from tandem.placement.workload.rows import (
    MAX_NUMBER,
    MAX_TOKENS,
    OUTPUT_COLUMNS,
    PROMPT_COLUMNS,
    RowFields,
    column,
    csv_table,
    open_text,
    reading,
    timestamp_s,
)


@dataclass(frozen=True, slots=True)
class Trace:
    """`has_classes`: the file names the SLO class of each request; without names, all requests have class 0.
    `num_rows` of the file; of these `num_without_output` are left out, and `num_late` come after a row that arrived
    later."""

    requests: RequestStream
    has_classes: bool
    num_rows: int
    num_without_output: int
    num_late: int


@dataclass(slots=True)
class _Columns:
    """One entry a row."""

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    slo_class: Ints
    blocks: list[list[int]]  # empty if no row names its blocks


def load_trace(path: Path) -> RequestStream:
    """The requests of a trace in order of arrival, the first at 0. Raises ConfigError with file and line."""
    return read_trace(path, ()).requests


def read_trace(path: Path, classes: Sequence[SloClass]) -> Trace:
    """Like `load_trace`. `classes` resolve the names in the column slo_class; without classes the column is ignored."""
    with reading(path, "a trace is CSV or JSON lines"):
        if _is_json_lines(path):
            has_classes = False
            with open_text(path) as lines:
                columns = _read_json_lines(path, lines)
        else:
            with open_text(path) as lines:
                read = _read_csv_columns(path, lines, classes)
            if read is None:
                if not path.is_file():
                    raise ConfigError(f"{path} has unusual or wrong values; save it as a file, which can be read again")
                with open_text(path) as lines:
                    read = _read_csv_rows(path, lines, classes)
            columns, has_classes = read
    num_rows = len(columns.arrival_s)
    order = np.argsort(columns.arrival_s, kind="stable")
    order = order[columns.output_tokens[order] > 0]
    if not len(order):
        raise ConfigError(f"{path} holds no requests" + (" with output tokens" if num_rows else ""))
    latest_s = np.maximum.accumulate(columns.arrival_s)
    num_late = int((columns.arrival_s < latest_s).sum())
    return Trace(_as_stream(path, columns, order), has_classes, num_rows, num_rows - len(order), num_late)


def _as_stream(path: Path, columns: _Columns, order: Ints) -> RequestStream:
    prompts = columns.prompt_tokens[order]
    groups = tokens = None
    if columns.blocks:
        try:
            groups, tokens = prefix_groups([columns.blocks[row] for row in order.tolist()], prompts)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
    arrival_s = columns.arrival_s[order]
    return RequestStream.make(
        arrival_s - arrival_s[0],
        prompts,
        columns.output_tokens[order],
        slo_class=columns.slo_class[order],
        prefix_group=groups,
        prefix_tokens=tokens,
    )


def _is_json_lines(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((".jsonl", ".json"))


@dataclass(frozen=True, slots=True)
class _Header:
    columns: Sequence[str]
    arrival: str
    prompt: str
    output: str
    has_classes: bool

    @classmethod
    def of(cls, path: Path, columns: Sequence[str], classes: Sequence[SloClass]) -> "_Header":
        return cls(
            columns,
            column(path, columns, ("arrival_s", "TIMESTAMP")),
            column(path, columns, PROMPT_COLUMNS),
            column(path, columns, OUTPUT_COLUMNS),
            "slo_class" in columns and len(classes) > 0,
        )


def _read_csv_columns(path: Path, lines: Iterable[str], classes: Sequence[SloClass]) -> tuple[_Columns, bool] | None:
    """None if a value is wrong or unusual."""
    reader = csv.reader(lines)
    try:
        header = _Header.of(path, next(reader, []), classes)
        rows = [row for row in reader if row]
    except csv.Error:
        return None

    def values(name: str) -> list[str]:
        index = header.columns.index(name)
        return [row[index] for row in rows]

    try:
        if header.arrival == "TIMESTAMP":
            arrival_s = np.array([timestamp_s(value) for value in values("TIMESTAMP")], dtype=np.float64)
        else:
            arrival_s = np.array(values(header.arrival), dtype=np.float64)
            if not ((arrival_s >= 0) & (arrival_s < MAX_NUMBER)).all():
                return None
        prompts = np.array(values(header.prompt), dtype=np.int64)
        outputs = np.array(values(header.output), dtype=np.int64)
        slo_class = np.zeros(len(rows), dtype=np.int64)
        if header.has_classes:
            index_of = {slo.name: index for index, slo in enumerate(classes)}
            slo_class = np.array([index_of[value] for value in values("slo_class")], dtype=np.int64)
    except (ValueError, IndexError, KeyError, OverflowError):
        return None
    if rows and (prompts.min() < 1 or outputs.min() < 0 or max(prompts.max(), outputs.max()) >= MAX_TOKENS):
        return None
    return _Columns(arrival_s, prompts, outputs, slo_class, []), header.has_classes


def _read_csv_rows(path: Path, lines: Iterable[str], classes: Sequence[SloClass]) -> tuple[_Columns, bool]:
    with csv_table(path, lines) as reader:
        header = _Header.of(path, reader.fieldnames or (), classes)
        class_index = {slo.name: index for index, slo in enumerate(classes)}
        rows = []
        for values in reader:
            fields = RowFields(f"{path} line {reader.line_num}", values)
            is_date = header.arrival == "TIMESTAMP"
            rows.append(
                (
                    fields.timestamp_s(header.arrival) if is_date else fields.number(header.arrival),
                    fields.tokens(header.prompt, minimum=1),
                    fields.tokens(header.output, minimum=0),
                    fields.slo_class("slo_class", class_index) if header.has_classes else 0,
                )
            )
    arrival_s = np.array([row[0] for row in rows], dtype=np.float64)
    prompts, outputs, slo_class = (np.array([row[i] for row in rows], dtype=np.int64) for i in (1, 2, 3))
    return _Columns(arrival_s, prompts, outputs, slo_class, []), header.has_classes


def _read_json_lines(path: Path, lines: Iterable[str]) -> _Columns:
    arrival_s, prompts, outputs, blocks, has_blocks = [], [], [], [], False
    for number, values in _json_objects(path, lines):
        timestamp, prompt, output = values.get("timestamp"), values.get("input_length"), values.get("output_length")
        ids = values.get("hash_ids", [])
        if not (
            type(timestamp) is int
            and type(prompt) is type(output) is int
            and 0 <= timestamp < MAX_NUMBER
            and 1 <= prompt < MAX_TOKENS
            and 0 <= output < MAX_TOKENS
            and type(ids) is list
        ):
            fields = RowFields(f"{path} line {number}", values)
            timestamp = fields.number("timestamp")
            prompt, output = fields.tokens("input_length", minimum=1), fields.tokens("output_length", minimum=0)
        for block in ids if isinstance(ids, list) else (None,):
            if type(block) is not int:
                raise RowFields(f"{path} line {number}", values).wrong("hash_ids", "a list of whole numbers", ids)
        arrival_s.append(timestamp / 1000.0)
        prompts.append(prompt)
        outputs.append(output)
        blocks.append(ids)
        has_blocks = has_blocks or bool(ids)
    return _Columns(
        np.array(arrival_s, dtype=np.float64),
        np.array(prompts, dtype=np.int64),
        np.array(outputs, dtype=np.int64),
        np.zeros(len(prompts), dtype=np.int64),
        blocks if has_blocks else [],
    )


def _json_objects(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object)."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} line {number}: is not a JSON object; write one object a line")
        yield number, values
