"""DistServe's published coefficients, and the step times of its simulator."""

import csv
from pathlib import Path

import pytest

from bench.common.distserve_costs import DEVICE, DistServeSource
from tandem.core.cost_model import StepLoad
from tandem.core.errors import ConfigError
from tandem.core.parallel import ParallelShape

_TABLE = Path(__file__).parent / "distserve_max_num_tokens.csv"  # simdistserve/estimators/profile_data, Apache-2.0


def test_memory_table_is_reproduced() -> None:
    rows = list(csv.DictReader(_TABLE.read_text("utf-8").splitlines()))
    sources = {name: DistServeSource(name) for name in ("OPT-13B", "OPT-66B", "OPT-175B")}
    for row in rows:
        source = sources["OPT-" + row["model"].removeprefix("facebook/opt-").upper()]
        shape = ParallelShape(int(row["tp"]), int(row["pp"]))
        assert source.kv_tokens(DEVICE, shape) == int(row["max_num_tokens"]), row
    assert len(rows) == 76
    assert sources["OPT-66B"].kv_tokens(DEVICE, ParallelShape()) == 0  # the weights do not fit


def test_coefficients_exist_where_they_were_published() -> None:
    def published(model: str) -> list[int]:
        return [tp for tp in range(1, 10) if DistServeSource(model).cost_model(DEVICE, ParallelShape(tp)) is not None]

    assert published("OPT-13B") == [1, 2, 4]
    assert published("OPT-66B") == [2, 3, 4, 8]
    assert published("OPT-175B") == []
    assert DistServeSource("OPT-13B").cost_model("H100-80GB-SXM5", ParallelShape()) is None
    assert DistServeSource("OPT-13B").cost_model(DEVICE, ParallelShape(1, 3)) is None  # 40 layers
    with pytest.raises(ConfigError, match="OPT-13B"):
        DistServeSource("OPT-13")


@pytest.mark.parametrize(
    ("model", "tp", "lengths", "expected_ms"),
    [  # Coefficients as published: a + b * sum(l) + c * sum(l^2), in ms
        ("OPT-13B", 1, (512,), 18.10254647 + 0.10191226 * 512 + 7.12226431e-6 * 512**2),
        ("OPT-66B", 4, (1000, 24), 29.44163604 + 0.15135218 * 1024 + 8.31745077e-6 * (1000**2 + 24**2)),
    ],
)
def test_prefill_follows_the_coefficients(model: str, tp: int, lengths: tuple[int, ...], expected_ms: float) -> None:
    bare = DistServeSource(model, ray_overhead=False).cost_model(DEVICE, ParallelShape(tp))
    assert bare is not None
    load = StepLoad.of_prompts(*lengths)
    assert bare.step(load).total_s == pytest.approx((expected_ms + 1) / 1e3, rel=1e-6)  # 1 ms per stage

    with_ray = DistServeSource(model).cost_model(DEVICE, ParallelShape(tp))
    assert with_ray is not None
    assert with_ray.step(load).total_s == pytest.approx((expected_ms + 1 + 2 + 1e-4 * sum(lengths)) / 1e3, rel=1e-6)


@pytest.mark.parametrize(
    ("batch", "a", "b", "c"), [(94, 19.9347, 6.26936e-4, 0.0385070), (95, 7.16619, 5.79800e-4, 0.158311)]
)
def test_decode_has_two_regimes(batch: int, a: float, b: float, c: float) -> None:
    bare = DistServeSource("OPT-13B", ray_overhead=False).cost_model(DEVICE, ParallelShape())
    assert bare is not None
    cost = bare.step(StepLoad.of_decode(batch, 512 * batch))
    assert cost.total_s == pytest.approx((a + b * 512 * batch + c * batch) / 1e3, rel=1e-5)
    assert cost.interval_s == pytest.approx(cost.total_s)


def test_a_pipeline_starts_the_next_prompt_before_it_ends() -> None:
    tp2 = DistServeSource("OPT-13B", ray_overhead=False).cost_model(DEVICE, ParallelShape(2, 1))
    tp2_pp4 = DistServeSource("OPT-13B", ray_overhead=False).cost_model(DEVICE, ParallelShape(2, 4))
    assert tp2 is not None
    assert tp2_pp4 is not None
    load = StepLoad.of_prompts(1024)
    computed_s = tp2.step(load).total_s - 1e-3
    assert tp2_pp4.step(load).total_s == pytest.approx(computed_s + 16e-3)  # pp stages of 1 ms * pp each
    assert tp2_pp4.step(load).interval_s == pytest.approx(computed_s / 4 + 4e-3)
    assert tp2.step(load).interval_s == pytest.approx(tp2.step(load).total_s)


def test_pipelined_decode_is_a_round_of_micro_batches() -> None:
    """Half the batch and half the KV pass both stages in the time that one stage has for the whole model."""
    bare = DistServeSource("OPT-66B", ray_overhead=False)
    tp4, tp4_pp2 = bare.cost_model(DEVICE, ParallelShape(4, 1)), bare.cost_model(DEVICE, ParallelShape(4, 2))
    assert tp4 is not None
    assert tp4_pp2 is not None
    assert tp4_pp2.step(StepLoad.of_decode(64, 40_000)).total_s == pytest.approx(
        tp4.step(StepLoad.of_decode(32, 20_000)).total_s
    )


@pytest.mark.parametrize("shape", [ParallelShape(1), ParallelShape(2, 2), ParallelShape(4, 4)])
@pytest.mark.parametrize("batch", [1, 3, 94, 95, 400])
@pytest.mark.parametrize("kv_tokens", [1, 777, 400_000])
def test_decode_coefficients_equal_the_step(shape: ParallelShape, batch: int, kv_tokens: int) -> None:
    cost = DistServeSource("OPT-13B").cost_model(DEVICE, shape)
    assert cost is not None
    base_s, per_kv_token_s = cost.decode_coefficients(batch)
    assert base_s + kv_tokens * per_kv_token_s == pytest.approx(
        cost.step(StepLoad.of_decode(batch, kv_tokens)).total_s, rel=1e-12
    )
