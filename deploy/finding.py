"""What a check says."""

from dataclasses import dataclass
from enum import Enum

_GIB = 1 << 30


class Grade(Enum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of a check. `advice` is empty if nothing is to be done."""

    subject: str
    grade: Grade
    text: str
    advice: str = ""


def gib(count: int) -> str:
    """A number of bytes, for people."""
    return f"{count / _GIB:.1f} GiB"
