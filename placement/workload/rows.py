"""Text files of one request or length a row: their opening, their columns, and sentences about what is wrong."""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from tandem.core.errors import ConfigError
from tandem.core.input_file import open_input
from tandem.core.slo_file import MAX_REQUESTS

MAX_TOKENS = 1 << 31
MAX_NUMBER = 1e12
_MAX_LINE_CHARS = 8 << 20  # a prompt of a million tokens has a block id for each 16 of them, at the most
_MAX_LINES = 2 * MAX_REQUESTS
PROMPT_COLUMNS = ("prompt_tokens", "input_tokens", "ContextTokens")
OUTPUT_COLUMNS = ("output_tokens", "GeneratedTokens")
_WHOLE_NUMBER = re.compile(r"\s*(\d{1,400})(?:\.0*)?\s*")  # 374, and 374.0 as tables write it after a missing value


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Errors of reading `path`, as ConfigError. `kind`: what the file should be, in a sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is not a complete .gz file ({error})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text; {kind}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error


@contextmanager
def open_text(path: Path) -> Iterator[Iterator[str]]:
    """The lines of a file, with their ends. Raises ConfigError for one that does not seem to end, such as a device."""
    with ExitStack() as stack:
        raw = stack.enter_context(open_input(path))
        content = stack.enter_context(gzip.open(raw)) if path.suffix == ".gz" else raw
        yield _lines(path, stack.enter_context(io.TextIOWrapper(content, encoding="utf-8-sig", newline="")))


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    number = 0
    while line := file.readline(_MAX_LINE_CHARS + 1):
        number += 1
        if len(line) > _MAX_LINE_CHARS:
            raise ConfigError(f"{path} line {number}: is longer than {_MAX_LINE_CHARS:,} characters; no row is as long")
        if number > _MAX_LINES:
            raise ConfigError(f"{path} has more than {_MAX_LINES:,} lines; take a part of it")
        yield line


@contextmanager
def csv_table(path: Path, lines: Iterable[str]) -> Iterator["csv.DictReader[str]"]:
    """A reader of `lines`; what is no CSV becomes a ConfigError with its line."""
    reader = csv.DictReader(lines)
    try:
        yield reader
    except csv.Error as error:
        raise ConfigError(f"{path} line {reader.line_num}: is not CSV ({error})") from error


def column(path: Path, columns: Sequence[str], names: Sequence[str]) -> str:
    for name in names:
        if name in columns:
            return name
    present = f"only {', '.join(columns)!r:.200}" if columns else "the file is empty"
    raise ConfigError(f"{path} line 1: there is no column {names[0]}{',' if columns else ';'} {present}")


def timestamp_s(value: str) -> float:
    """A date and time as seconds since 1970. Raises ValueError."""
    moment = datetime.fromisoformat(value)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


class RowFields:
    """One row. All methods raise ConfigError with file, line and field for a value of the wrong kind."""

    def __init__(self, where: str, values: Mapping[str, object]) -> None:
        self._where = where
        self._values = values

    def number(self, name: str) -> float:
        value = self._values.get(name)
        try:
            number = float(value) if isinstance(value, (str, int, float)) else -1.0
        except (ValueError, OverflowError):
            number = -1.0
        if isinstance(value, bool) or not 0 <= number < MAX_NUMBER:
            raise self.wrong(name, "a number of at least 0", value)
        return number

    def timestamp_s(self, name: str) -> float:
        """A date and time as seconds since 1970."""
        value = self._values.get(name)
        try:
            return timestamp_s(str(value))
        except ValueError as error:
            raise self.wrong(name, "a date and time, e.g. 2023-11-16 18:15:46.680590", value) from error

    def tokens(self, name: str, *, minimum: int) -> int:
        value = self._values.get(name)
        number = int(match[1]) if isinstance(value, str) and (match := _WHOLE_NUMBER.fullmatch(value)) else value
        number = int(number) if isinstance(number, float) and number.is_integer() else number
        if isinstance(number, bool) or not isinstance(number, int) or not minimum <= number < MAX_TOKENS:
            raise self.wrong(name, f"a whole number of at least {minimum}", value)
        return number

    def slo_class(self, name: str, class_index: Mapping[str, int]) -> int:
        value = self._values.get(name)
        if not isinstance(value, str) or value not in class_index:
            raise self.wrong(name, f"one of the SLO classes {', '.join(class_index)}", value)
        return class_index[value]

    def wrong(self, name: str, expected: str, value: object) -> ConfigError:
        shown = "missing" if value is None else f"{value!r}"
        return ConfigError(f"{self._where}: {name} must be {expected}, not {shown[:60]}")
