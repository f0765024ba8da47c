"""How one instance is spread over devices."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class ParallelShape:
    """`tp` ranks share every layer; `pp` stages share the layers. Written tp4, pp2 or tp4pp2."""

    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        assert self.tp >= 1
        assert self.pp >= 1

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"tp{self.tp}" + (f"pp{self.pp}" if self.pp > 1 else "")

    @classmethod
    def parse(cls, text: str) -> "ParallelShape":
        """The inverse of `str`; the parts may stand in any order. Raises ValueError."""
        parts = re.fullmatch(r"(?:tp(\d+))?[\s,x-]*(?:pp(\d+))?", text.strip().lower())
        if parts is None or not any(parts.groups()) or "0" in parts.groups():
            raise ValueError(f"'{text}' is not a parallel shape; write tp4, or tp4pp2")
        return cls(int(parts[1] or 1), int(parts[2] or 1))
