"""What commands print: lines, tables and progress; with colours on a terminal, plain text everywhere else."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 10_000  # a pipe does not wrap lines
_LINE_INTERVAL_S = 10.0


def print_line(text: str = "") -> None:
    """Print a line at once, even into a pipe."""
    print(text, flush=True)


def print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def console(stream: TextIO) -> Console:
    """For a terminal or a pipe. Markup in texts is not interpreted: names and paths may contain brackets."""
    tty = stream.isatty()
    width = None if tty else _PIPE_WIDTH
    return Console(file=stream, force_terminal=tty, width=width, markup=False, emoji=False, highlight=False)


def print_rich(*parts: RenderableType) -> None:
    """Print texts and tables below each other; into a pipe without colours and without spaces at the ends of lines."""
    out = console(sys.stdout)
    with out.capture() as capture:
        out.print(*parts, sep="\n")
    text = capture.get()
    print(text if out.is_terminal else "\n".join(line.rstrip() for line in text.split("\n")), end="", flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> Table:
    """Columns without lines, two spaces apart. A narrow terminal wraps cells of several words, or else folds names."""
    columns = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(header))
    has_words = [any(" " in str(cell) for cell in cells) for cells in zip(*rows, strict=True)]
    for name, wraps in zip(header, has_words, strict=True):
        columns.add_column(name, overflow="fold", no_wrap=any(has_words) and not wraps)
    for row in rows:
        columns.add_row(*row)
    return columns


@contextmanager
def show_progress(stream: TextIO) -> Iterator[Callable[[float, str], None]]:
    """Yields a function that takes the share that is done, 0 to 1, and what is being done. On a terminal they are a
    bar, which is gone at the end; elsewhere a line every ten seconds."""
    if stream.isatty():
        share_done = TextColumn("{task.percentage:3.0f} %")
        doing = TextColumn("{task.description}", markup=False)
        bar = Progress(share_done, BarColumn(24), TimeElapsedColumn(), doing, console=console(stream), transient=True)
        with bar:
            task = bar.add_task("", total=1.0)
            yield lambda share, text: bar.update(task, completed=share, description=text)
        return
    printed_s = time.monotonic()

    def print_now_and_then(share: float, text: str) -> None:
        nonlocal printed_s
        if time.monotonic() - printed_s >= _LINE_INTERVAL_S:
            printed_s = time.monotonic()
            print(f"{share:4.0%} {text}", file=stream, flush=True)

    yield print_now_and_then
