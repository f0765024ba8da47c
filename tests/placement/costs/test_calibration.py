"""A calibration's fit, its file, and the cost model that answers from it."""

import math
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.config_file import dump_config
from tandem.core.cost_model import StepLoad, staged
from tandem.core.errors import ConfigError
from tandem.core.parallel import ParallelShape
from tandem.placement.costs.calibration import (
    CalibratedSource,
    Calibration,
    FollowingSteps,
    ShapeCalibration,
    load_calibration,
)
from tandem.placement.costs.rank_messages import Collective, MessageCost, StepMessages
from tandem.placement.costs.resharding import KvShape, KvTransfer, Resharding, resharding_of
from tandem.placement.costs.serving import PathCosts, ServedStep, ServingCosts
from tandem.placement.costs.step_fit import CalibratedCost, FitError, Measurement, Terms, fit_error, fit_terms

TRUE = Terms(
    linear=((1, 0.010), (4, 0.011), (16, 0.030), (64, 0.100), (256, 0.360), (1024, 1.5)),
    attention_per_pair=2e-7,
    kv_read=((1, 1e-6), (4, 2e-6), (16, 2.5e-6), (64, 2.5e-6)),
    kv_per_sequence=1e-5,
    head=0.0,
    head_per_sampled=2e-4,
)


SERVED = ServingCosts(
    prefill_alone=ServedStep(constant_s=0.0, factor=1.0),
    prefill_contended=ServedStep(constant_s=0.004, factor=1.5),
    cold_step_factor=0.1,
    request_admission_cost_s=0.002,
    decode_alone=ServedStep(constant_s=0.001, factor=0.8),
    decode_contended=ServedStep(constant_s=0.002, factor=1.2),
)


def measured(load: StepLoad, seconds: float, *, held_out: bool = False) -> Measurement:
    values = {name: getattr(load, name) for name in StepLoad.__dataclass_fields__}
    return Measurement(**values, seconds=seconds, held_out=held_out)


def grid_of(terms: Terms) -> list[Measurement]:
    """A noiseless machine: prompts whole, in several pieces and undrawn; decode by batch and context; some held out."""
    loads = [StepLoad.of_prompts(n) for n in (4, 16, 64, 256, 1024)]
    loads += [StepLoad.of_prompts(*[n // 4] * 4) for n in (64, 256)]
    loads += [StepLoad.of_decode(batch, batch * context) for batch in (1, 4, 16, 64) for context in (32, 256, 1024)]
    loads += [StepLoad(prefill_tokens=64, prefill_sequences=1, prefill_pairs=2080, prefill_kv_tokens=64)]
    cost = CalibratedCost(terms)
    fitted = [measured(load, cost.step(load).total_s) for load in loads]
    others = [StepLoad.of_prompts(100), StepLoad.of_prompts(30, 200), StepLoad.of_decode(8, 3000)]
    return fitted + [measured(load, cost.step(load).total_s, held_out=True) for load in others]


FEW = [
    measured(StepLoad.of_prompts(16), 0.100),
    measured(StepLoad.of_prompts(18), 0.100),
    measured(StepLoad.of_decode(1, 100), 0.010),
    measured(StepLoad.of_decode(1, 1000), 0.011),
]


def calibration(**changes: object) -> Calibration:
    values: dict[str, object] = {
        "measured_on": date(2026, 11, 21),
        "device": "a CPU",
        "cores": 2,
        "model": "tiny",
        "weights_hash": "abc",
        "dtype": "float32",
        "ops": "native",
        "threads": 1,
        "kv_bytes_per_token": 1024.0,
        "kv_memory_bytes": 1 << 20,
        "terms": TRUE,
        "error": FitError(median=0.03, mean=0.04, worst=0.1, fitted_median=0.01),
    }
    return Calibration.model_validate(values | changes)


def test_a_fit_predicts_what_it_has_not_seen() -> None:
    grid = grid_of(TRUE)
    fitted = fit_terms(grid)
    error = fit_error(fitted, grid)
    assert error.worst < 1e-6
    assert fitted.attention_per_pair == pytest.approx(TRUE.attention_per_pair, rel=1e-3)
    assert dict(fitted.kv_read) == pytest.approx(dict(TRUE.kv_read), rel=1e-3)


def test_noise_does_not_make_more_rows_cheaper() -> None:
    noisy = [one.model_copy(update={"seconds": one.seconds * (1.2 if one.load.tokens == 16 else 0.9)}) for one in FEW]
    linear = fit_terms(noisy).linear
    assert [value for _, value in linear] == sorted(value for _, value in linear)


def test_what_is_held_out_is_not_fitted_and_makes_the_error() -> None:
    grid = grid_of(TRUE)
    wrong = [one.model_copy(update={"seconds": one.seconds * 1.25}) if one.held_out else one for one in grid]
    assert fit_terms(wrong) == fit_terms(grid)
    error = fit_error(fit_terms(wrong), wrong)
    assert error.median == pytest.approx(0.2, abs=1e-3)
    assert error.fitted_median < 1e-6
    assert math.isnan(fit_error(TRUE, [one for one in grid if not one.held_out]).median)


def test_nothing_to_fit_with_is_said() -> None:
    only_prompts = [one for one in grid_of(TRUE) if one.prefill_tokens]
    with pytest.raises(ValueError, match="both"):
        fit_terms(only_prompts)


@given(batch=st.integers(1, 300), kv_tokens=st.integers(0, 1 << 20), busy=st.floats(0, 1))
def test_decode_is_affine_in_the_kv_that_it_reads(batch: int, kv_tokens: int, busy: float) -> None:
    cost = CalibratedCost(TRUE, SERVED, contended=busy)
    base_s, per_token_s = cost.decode_coefficients(batch)
    step = cost.step(StepLoad.of_decode(batch, kv_tokens))
    assert step.total_s == pytest.approx(base_s + kv_tokens * per_token_s, rel=1e-9)
    assert step.interval_s == pytest.approx(step.total_s, rel=1e-9)
    assert step.total_s > 0


@given(tokens=st.integers(1, 5000), more=st.integers(1, 500))
def test_a_longer_prompt_never_takes_less(tokens: int, more: int) -> None:
    cost = CalibratedCost(TRUE)
    shorter, longer = (cost.step(StepLoad.of_prompts(n)).total_s for n in (tokens, tokens + more))
    assert 0 < shorter <= longer


@pytest.mark.parametrize(
    ("busy", "prefill", "decode"),
    [(0.0, (0.0, 1.0), (0.001, 0.8)), (1.0, (0.004, 1.5), (0.002, 1.2)), (0.5, (0.002, 1.25), (0.0015, 1.0))],
)
def test_what_serving_adds_is_of_the_role_and_the_neighbour(
    busy: float, prefill: tuple[float, float], decode: tuple[float, float]
) -> None:
    bare, served = CalibratedCost(TRUE), CalibratedCost(TRUE, SERVED, contended=busy)
    for load, (constant_s, factor) in (
        (StepLoad.of_prompts(64), prefill),
        (StepLoad.of_decode(3, 400), decode),
        (StepLoad(prefill_tokens=8, prefill_sequences=1, prefill_pairs=36, decode_sequences=2, sampled=3), prefill),
    ):
        step, engine = served.step(load), bare.step(load)
        assert step.kv_read_s == engine.kv_read_s
        assert step.total_s - step.kv_read_s == pytest.approx(constant_s + factor * (engine.total_s - engine.kv_read_s))
        assert step.overhead_s == pytest.approx(constant_s)
    assert served.step(StepLoad()).total_s == 0


BY_BATCH = ServedStep(factor=1.5, by_batch=((1, 2.0), (5, 1.2), (16, 1.0)))


def test_what_serving_adds_to_decode_may_depend_on_the_batch() -> None:
    factors = {n: BY_BATCH.factor_of(n) for n in (1, 2, 3.0, 5, 16, 100)}
    assert factors == pytest.approx({1: 2.0, 2: 1.8, 3.0: 1.6, 5: 1.2, 16: 1.0, 100: 1.0})
    slowed = BY_BATCH.slowed_as(ServedStep(factor=1.0), ServedStep(factor=1.1))
    assert dict(slowed.by_batch) == pytest.approx({1: 2.2, 5: 1.32, 16: 1.1})
    half = BY_BATCH.interpolate(slowed, 0.5)
    assert (half.factor_of(1), half.factor_of(40)) == pytest.approx((2.1, 1.05))
    served, bare = CalibratedCost(TRUE, ServingCosts(decode_alone=BY_BATCH), contended=0.0), CalibratedCost(TRUE)
    for batch, kv_tokens in ((1, 100), (3, 50), (40, 9000)):
        load = StepLoad.of_decode(batch, kv_tokens)
        step, engine = served.step(load), bare.step(load)
        others_s = BY_BATCH.factor_of(batch) * (engine.total_s - engine.kv_read_s)
        assert step.total_s == pytest.approx(others_s + engine.kv_read_s)
        base_s, per_token_s = served.decode_coefficients(batch)
        assert step.total_s == pytest.approx(base_s + kv_tokens * per_token_s)


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    request_path = PathCosts(
        admission_s=0.002,
        first_token_s=0.001,
        token_s=0.001,
        transfer_alone_s=0.004,
        transfer_contended_s=0.008,
        per_concurrent_transfer_s=0.001,
        transfer_bytes_per_s=2e9,
    )
    written = calibration(
        measurements=tuple(grid_of(TRUE)),
        request_path=request_path,
        serving=SERVED,
        shapes=(TP2,),
        collectives=(SUMS,),
        transfers=(transfer(KvShape(), KvShape(pp=2), 1e-3, 4e9),),
    )
    path = tmp_path / "calibration.yaml"
    path.write_text(dump_config(written))
    read = load_calibration(path)
    assert read == written
    assert read.router_spec().admission_s == 0.002
    assert read.network_spec().latency_s == 0.008
    assert read.network_spec(contended=0.25).latency_s == pytest.approx(0.005)
    assert read.network_spec().per_concurrent_transfer_s == 0.001
    assert read.network_spec().intra_node_bytes_per_s == 2e9
    assert calibration().network_spec().intra_node_bytes_per_s == math.inf


def test_knots_out_of_order_are_a_mistake_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "calibration.yaml"
    terms = TRUE.model_copy(update={"linear": ((4, 0.1), (1, 0.2))})
    path.write_text(dump_config(calibration().model_copy(update={"terms": terms})))
    with pytest.raises(ConfigError, match="ascend"):
        load_calibration(path)


SLOWER = TRUE.model_copy(update={"linear": tuple((rows, 2.0 * seconds) for rows, seconds in TRUE.linear)})
SUMS = Collective(
    operation="all_reduce",
    ranks=2,
    transport="shared_memory",
    cost=MessageCost(latency_s=2e-5, bytes_per_s=4e9),
    error=0.1,
)
TP2 = ShapeCalibration(
    tp=2,
    kv_bytes_per_token=512.0,
    messages=StepMessages(all_reduces=9, all_reduce_bytes=1024),
    terms=SLOWER,
    error=FitError(median=0.05, mean=0.06, worst=0.2, fitted_median=0.01),
)


def test_a_source_knows_the_shapes_that_were_measured() -> None:
    source = CalibratedSource({"cpu": calibration(shapes=(TP2,))})
    one, two = ParallelShape(), ParallelShape(2)
    assert source.cost_model("cpu", one) is not None
    tp2 = source.cost_model("cpu", two)
    assert tp2 is not None
    assert tp2.step(StepLoad.of_prompts(64)).total_s == CalibratedCost(SLOWER).step(StepLoad.of_prompts(64)).total_s
    assert source.cost_model("cpu", ParallelShape(1, 2)) is None
    assert source.cost_model("H100", one) is None
    assert source.kv_tokens("cpu", one) == 1024
    assert source.kv_tokens("cpu", two) == 2048, "each rank has a pool, and half of a token's KV"
    assert source.kv_tokens("cpu", ParallelShape(1, 2)) == 0
    assert CalibratedSource({"cpu": calibration()}, kv_memory_bytes=1 << 21).kv_tokens("cpu", one) == 2048
    assert source.error == 0.05
    with pytest.raises(ConfigError, match="different models: other, tiny"):
        CalibratedSource({"cpu": calibration(), "gpu": calibration(model="other")})


@given(prompt=st.integers(0, 2000), batch=st.integers(0, 64))
def test_messages_are_a_part_of_what_was_measured_with_a_name_of_their_own(prompt: int, batch: int) -> None:
    measured = calibration(shapes=(TP2,), collectives=(SUMS,))
    named, plain = measured.engine_cost(ParallelShape(2)), CalibratedCost(SLOWER)
    assert named is not None
    load = StepLoad.of_prompts(*[prompt] if prompt else []).beside_decode(batch, 100 * batch)
    step, whole = named.step(load), plain.step(load)
    assert step.total_s == pytest.approx(whole.total_s, rel=1e-9)
    assert step.interval_s == pytest.approx(step.total_s, rel=1e-9)
    assert step.linear_s >= 0
    rows = load.tokens
    if rows:
        assert step.collective_s == pytest.approx(min(whole.linear_s, 9 * (2e-5 + rows * 1024 / 4e9)))
    assert step.pipeline_s == 0


def test_shapes_are_slowed_by_others_as_one_rank_is() -> None:
    alone = ServedStep(constant_s=0.001, factor=1.5)
    of_shape = SERVED.with_steps_alone(alone, alone)
    assert of_shape.prefill_alone == of_shape.decode_alone == alone
    assert of_shape.prefill_contended == ServedStep(constant_s=0.005, factor=2.25)
    contended = of_shape.decode_contended
    assert (contended.constant_s, contended.factor) == pytest.approx((0.002, 2.25))
    hardly = SERVED.model_copy(update={"prefill_contended": ServedStep(factor=0.5)})
    assert hardly.with_steps_alone(alone, alone).prefill_contended == alone, "others never make it faster"
    measured = calibration(serving=SERVED, shapes=(TP2.model_copy(update={"serving": of_shape}),))
    assert measured.serving_of(ParallelShape(2)) == of_shape
    assert measured.serving_of(ParallelShape()) == SERVED
    cost = measured.cost(ParallelShape(2), contended=0.0)
    assert cost is not None
    assert cost.step(StepLoad.of_prompts(64)).overhead_s == 0.001


def test_an_instance_that_has_its_node_for_itself_computes_alone() -> None:
    measured = calibration(serving=SERVED, shapes=(TP2.model_copy(update={"serving": SERVED}),))
    source = CalibratedSource({"cpu": measured}, devices_per_node={"cpu": 2})
    for shape, busy in ((ParallelShape(), 1.0), (ParallelShape(2), 0.0)):
        cost, expected = source.cost_model("cpu", shape), measured.cost(shape, contended=busy)
        assert cost is not None
        assert expected is not None
        assert cost.step(StepLoad.of_prompts(64)) == expected.step(StepLoad.of_prompts(64))


def test_a_shape_is_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "calibration.yaml"
    path.write_text(dump_config(calibration().model_copy(update={"shapes": (TP2, TP2)})))
    with pytest.raises(ConfigError, match="each shape must be there once"):
        load_calibration(path)


def transfer(source: KvShape, destination: KvShape, latency_s: float, bytes_per_s: float) -> KvTransfer:
    return KvTransfer(
        source=source, destination=destination, cost=MessageCost(latency_s=latency_s, bytes_per_s=bytes_per_s)
    )


def test_resharding_is_what_a_transfer_takes_more_than_a_plain_one() -> None:
    one, two, larger = KvShape(), KvShape(tp=2), KvShape(block_size=32)
    found = resharding_of(
        (
            transfer(one, one, 1e-3, 4e9),
            transfer(two, one, 3e-3, 2e9),
            transfer(one, two, 0.5e-3, 5e9),
            transfer(one, larger, 1e-3, 1e9),
        ),
        block_size=16,
    )
    assert found.keys() == {(one.shape, one.shape), (two.shape, one.shape), (one.shape, two.shape)}
    assert found[two.shape, one.shape].model_dump() == pytest.approx({"extra_s": 2e-3, "factor": 2.0})
    assert found[one.shape, two.shape] == Resharding(extra_s=0.0, factor=0.8)
    assert found[one.shape, one.shape] == Resharding(extra_s=0.0, factor=1.0)
    assert resharding_of((transfer(two, one, 3e-3, 2e9),), block_size=16) == {}


HALF = TRUE.model_copy(update={"linear": tuple((rows, 0.6 * seconds) for rows, seconds in TRUE.linear)})
PP2 = ShapeCalibration(
    pp=2,
    kv_bytes_per_token=512.0,
    terms=TRUE,
    error=TP2.error,
    following=FollowingSteps(terms=HALF, error=FitError(median=0.07, mean=0.07, worst=0.2, fitted_median=0.01)),
)


def two_stages(serving: ServingCosts | None = None) -> CalibratedCost:
    return CalibratedCost(TRUE, serving, num_stages=2, following=HALF)


def test_a_step_through_two_stages_makes_room_for_the_next_when_it_was_measured_to() -> None:
    cost, load = two_stages(), StepLoad.of_prompts(256)
    alone, following = CalibratedCost(TRUE).step(load), CalibratedCost(HALF).step(load)
    assert cost.num_stages == 2
    assert cost.one_step(load) == cost.step(load)
    assert cost.step(load).total_s == alone.total_s
    assert cost.step(load).interval_s == following.total_s
    assert staged(cost) is cost
    assert staged(CalibratedCost(TRUE, num_stages=2)) is None, "an old file: steps were measured one at a time"
    none = TRUE.model_copy(update={"linear": ((1, 0.0),), "attention_per_pair": 0.0})
    fast = CalibratedCost(TRUE, num_stages=2, following=none).step(load)
    assert fast.interval_s == pytest.approx(fast.total_s / 2), "a stage has at least half of the work"
    slow = CalibratedCost(HALF, num_stages=2, following=TRUE).step(load)
    assert slow.interval_s == slow.total_s, "the next step never waits for longer than the end of this one"


def test_decoding_sequences_take_turns_in_groups() -> None:
    """Up to 16 stay together, and have one step at a time; of more, two steps follow each other."""
    cost = two_stages()
    few, kv_tokens = StepLoad.of_decode(16, 4000), 9600
    assert cost.step(few).total_s == cost.one_step(few).total_s == CalibratedCost(TRUE).step(few).total_s
    assert cost.step(few).interval_s == cost.step(few).total_s
    group = StepLoad.of_decode(20, kv_tokens // 2)
    interval_s = cost.one_step(group).interval_s
    round_s = cost.step(StepLoad.of_decode(40, kv_tokens)).total_s
    assert round_s == pytest.approx(2 * interval_s)
    assert round_s < cost.step(StepLoad.of_decode(32, kv_tokens)).total_s * 40 / 32
    assert round_s < CalibratedCost(TRUE).step(StepLoad.of_decode(40, kv_tokens)).total_s


@given(batch=st.integers(1, 300), kv_tokens=st.integers(0, 1 << 20), prompt=st.integers(0, 600))
def test_a_round_of_two_stages_is_affine_and_between_half_of_the_steps_and_all(
    batch: int, kv_tokens: int, prompt: int
) -> None:
    cost, one_stage = two_stages(SERVED), CalibratedCost(TRUE, SERVED)
    base_s, per_token_s = cost.decode_coefficients(batch)
    step = cost.step(StepLoad.of_decode(batch, kv_tokens))
    assert step.total_s == pytest.approx(base_s + kv_tokens * per_token_s, rel=1e-9)
    assert step.interval_s == pytest.approx(step.total_s, rel=1e-9)
    mixed = StepLoad.of_prompts(*[prompt] if prompt else []).beside_decode(batch, kv_tokens)
    assert cost.step(mixed).interval_s == pytest.approx(cost.step(mixed).total_s)
    single = cost.one_step(mixed)
    assert single.total_s == one_stage.step(mixed).total_s
    assert single.total_s / 2 <= single.interval_s * (1 + 1e-9)
    assert single.interval_s <= single.total_s


def test_steps_that_follow_each_other_are_in_the_file_and_in_the_source(tmp_path: Path) -> None:
    path, shape = tmp_path / "calibration.yaml", ParallelShape(pp=2)
    path.write_text(dump_config(calibration(shapes=(PP2,))))
    source = CalibratedSource({"cpu": load_calibration(path)})
    assert source.error == 0.07
    cost, load = source.cost_model("cpu", shape), StepLoad.of_prompts(64)
    assert cost is not None
    assert cost.step(load).interval_s == CalibratedCost(HALF).step(load).total_s
    path.write_text(dump_config(calibration(shapes=(PP2,))).replace("following:", "unknown:"))
    with pytest.raises(ConfigError, match="unknown"):
        load_calibration(path)
    old = calibration(shapes=(PP2.model_copy(update={"following": None}),))
    lines = [line for line in dump_config(old).splitlines() if "following" not in line]  # as files were before
    path.write_text("\n".join(lines))
    serial = load_calibration(path).engine_cost(shape)
    assert serial is not None
    assert serial.step(load).interval_s == serial.step(load).total_s
