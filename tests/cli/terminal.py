"""A terminal as far as programs ask."""

import io


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True
