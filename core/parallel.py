"""How one instance is divided over devices."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class ParallelShape:
    """Every layer is divided over `tp` ranks, the layers over `pp` stages. Written tp4, pp2 or tp4pp2."""

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
