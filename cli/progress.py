"""How far a long computation is: a bar on a terminal, else a line now and then."""

import time
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

_LINE_INTERVAL_S = 10.0


class Progress:
    """Call it with the share that is done, 0 to 1, and with what is being done. Used as a context manager."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: tqdm[Any] | None = None
        self._told_s = time.monotonic()

    def __enter__(self) -> "Progress":
        if self._stream.isatty():
            bar_format = "{percentage:3.0f} % |{bar:24}| {elapsed} {desc}"
            bar: tqdm[Any] = tqdm(total=1, file=self._stream, bar_format=bar_format, leave=False, dynamic_ncols=True)
            self._bar = bar
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, share: float, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.n = min(1.0, share)
            self._bar.refresh()
        elif time.monotonic() - self._told_s >= _LINE_INTERVAL_S:
            self._told_s = time.monotonic()
            print(f"{share:4.0%} {text}", file=self._stream, flush=True)
