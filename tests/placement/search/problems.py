"""Small problems with round numbers; a search takes a second."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tandem.core.cost_model import StepCost, StepLoad
from tandem.core.model_shape import ModelShape
from tandem.core.parallel import ParallelShape
from tandem.core.slo import SloClass
from tandem.core.slo_file import ClusterSection, Layout, NodeSection, SearchSection
from tandem.placement.cluster import Cluster
from tandem.placement.search.problem import Problem
from tandem.placement.workload.requests import RequestStream

MODEL = ModelShape("toy", 8, 1024, 8, 8, 128, 4096, 32000, 4096)
A100, H100 = "A100-80GB-SXM4", "H100-80GB-SXM5"
SLO = SloClass(ttft_s=0.2, tpot_s=0.03)


@dataclass(frozen=True)
class ToyCost:
    """A step takes 5 ms, 0.1 ms per prompt token, 0.1 ms per decoding sequence; tp divides all but the first."""

    speed: float

    def step(self, load: StepLoad) -> StepCost:
        decode_s = 1e-4 * load.decode_sequences / self.speed
        kv_s = 1e-7 * load.decode_kv_tokens / self.speed
        total_s = 5e-3 + 1e-4 * load.prefill_tokens / self.speed + decode_s + kv_s
        return StepCost(
            linear_s=1e-4 * load.prefill_tokens / self.speed + decode_s,
            kv_read_s=kv_s,
            overhead_s=5e-3,
            interval_s=total_s,
        )

    def decode_coefficients(self, sequences: int) -> tuple[float, float]:
        return 5e-3 + 1e-4 * sequences / self.speed, 1e-7 / self.speed


@dataclass(frozen=True)
class ToySource:
    """tp1 holds `tokens` tokens of KV; H100s are twice as fast as A100s."""

    tokens: int = 40_000

    def cost_model(self, device: str, shape: ParallelShape) -> ToyCost | None:
        return ToyCost(shape.num_ranks**0.9 * (2 if device == H100 else 1))

    def kv_tokens(self, device: str, shape: ParallelShape) -> int:
        return self.tokens * shape.num_ranks

    @property
    def error(self) -> float:
        return 0.1


def requests(count: int = 2400, seed: int = 0) -> RequestStream:
    rng = np.random.default_rng(seed)
    return RequestStream.make(
        np.cumsum(rng.exponential(size=count)),
        rng.integers(50, 800, count),
        rng.integers(2, 100, count),
    )


def problem(
    devices: int = 4,
    nodes: int = 1,
    *,
    slo: SloClass = SLO,
    layouts: Sequence[Layout] = ("disaggregated",),
    source: ToySource | None = None,
    more: Sequence[NodeSection] = (),
    rate: float | None = None,
    affinity: str = "auto",
    max_tp: int = 2,
) -> Problem:
    cluster = ClusterSection(nodes=(NodeSection(device=A100, devices=devices, count=nodes), *more))
    stream = requests()
    return Problem(
        model=MODEL,
        source=source or ToySource(),
        cluster=Cluster.of(cluster),
        classes=(slo,),
        section=SearchSection(
            layouts=tuple(layouts),
            max_tp=max_tp,
            max_pp=1,
            requests=300,
            node_affinity=affinity,
            only_served=False,
        ),
        requests=stream,
        computed=stream.head(300),
        rate=rate,
        cheapest=rate is not None,
    )
