"""How one instance is divided over devices."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class ParallelShape:
    """Every layer is divided over `tp` ranks, the layers over `pp` stages. Written tp4, pp2 or tp4pp2.

    Ranks count tensor-parallel first: rank = stage * tp + its number within the stage.

    With `dp` > 1, written dp8, the experts of a mixture are divided over `dp` ranks, of which each computes attention
    and everything else for sequences of its own; tp and pp are 1.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        assert self.tp >= 1
        assert self.pp >= 1
        assert self.dp == 1 or (self.dp > 1 and self.tp == self.pp == 1)

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp * self.dp

    @classmethod
    def parse(cls, text: str) -> "ParallelShape":
        """tp x pp, such as 2x1. Raises ValueError."""
        match = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", text.strip())
        if match is None:
            raise ValueError(f"'{text}' is not a shape; write tp x pp, e.g. 2x1")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        if self.dp > 1:
            return f"dp{self.dp}"
        return f"tp{self.tp}" + (f"pp{self.pp}" if self.pp > 1 else "")


@dataclass(frozen=True, slots=True)
class RankHosts:
    """Which ranks of an instance are on which host: consecutive ranks on each, as many as `per_host` says, rank 0 on
    the first host."""

    shape: ParallelShape
    per_host: tuple[int, ...]

    def __post_init__(self) -> None:
        assert min(self.per_host) >= 1
        assert sum(self.per_host) == self.shape.num_ranks

    def ranks_of(self, host: int) -> range:
        first = sum(self.per_host[:host])
        return range(first, first + self.per_host[host])

    def host_of(self, rank: int) -> int:
        return next(host for host in range(len(self.per_host)) if rank in self.ranks_of(host))

    def share_host(self, ranks: Iterable[int]) -> bool:
        return len({self.host_of(rank) for rank in ranks}) == 1


def share(total: int, parts: int, index: int) -> range:
    """The `index`-th of `parts` consecutive ranges over `total` items; sizes differ by one at most, larger first."""
    size, larger = divmod(total, parts)
    begin = index * size + min(index, larger)
    return range(begin, begin + size + (index < larger))


def kv_heads_of(num_kv_heads: int, tp: int, tp_rank: int) -> range:
    """The model's KV heads that a rank holds. With more ranks than heads each head is on several ranks (replicas)."""
    if tp <= num_kv_heads:
        return share(num_kv_heads, tp, tp_rank)
    head = tp_rank * num_kv_heads // tp
    return range(head, head + 1)


def query_heads_of(num_heads: int, num_kv_heads: int, tp: int, tp_rank: int) -> range:
    """The query heads that a rank computes: those that share its KV heads; replicas of a KV head divide them."""
    assert tp <= num_heads
    shared_by = num_heads // num_kv_heads
    kv_heads = kv_heads_of(num_kv_heads, tp, tp_rank)
    holders = [rank for rank in range(tp) if kv_heads_of(num_kv_heads, tp, rank) == kv_heads]
    part = share(len(kv_heads) * shared_by, len(holders), holders.index(tp_rank))
    first = kv_heads.start * shared_by
    return range(first + part.start, first + part.stop)


def layers_of(num_layers: int, pp: int, stage: int, head_cost: float) -> range:
    """The layers of a pipeline stage, so that the slowest stage is as fast as possible.

    `head_cost` is the time of the output head, which the last stage computes too, in units of a layer's time. Every
    stage has a layer.
    """
    assert 1 <= pp <= num_layers
    if pp == 1:
        return range(num_layers)

    def slowest(last: int) -> float:
        return max(last + head_cost, -(-(num_layers - last) // (pp - 1)))

    last = min(range(num_layers - pp + 1, 0, -1), key=slowest)
    return share(num_layers - last, pp - 1, stage) if stage < pp - 1 else range(num_layers - last, num_layers)
