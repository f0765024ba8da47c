"""The C++ kernels against plain torch, and the promise that a row's result depends on nothing but the row."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tandem.engine.ops.interface import AttentionMeta, HeadShape
from tandem.engine.ops.native_library import NativeUnavailableError, load_native_library
from tandem.engine.ops.native_ops import NativeOps
from tandem.engine.ops.torch_ops import TorchOps

DTYPES = [torch.float32, torch.bfloat16]
MakeOps = Callable[[int], NativeOps]


@pytest.fixture(
    scope="module",
    params=[
        None,
        pytest.param(("-march=x86-64-v3",), marks=pytest.mark.slow),
        pytest.param(("-march=x86-64-v2",), marks=pytest.mark.slow),
        pytest.param(("-march=native", "-DTANDEM_EMULATE_BF16_DOT"), marks=pytest.mark.slow),
        pytest.param(("-march=native", "-DTANDEM_EMULATE_TILES", "-DTANDEM_EMULATE_BF16_DOT"), marks=pytest.mark.slow),
    ],
    ids=["this-cpu", "avx2", "sse", "bf16-dot", "tiles"],
)
def make_ops(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MakeOps:
    """This processor's kernels, and those that other ones get, as far as this one can run them."""
    cache_dir = None if request.param is None else tmp_path_factory.mktemp("native")
    try:
        library = load_native_library(cache_dir, request.param)
    except NativeUnavailableError as error:
        pytest.skip(str(error))
    return lambda num_threads: NativeOps(library, num_threads)


@pytest.fixture(params=[1, 3], ids=["1-thread", "3-threads"])
def ops(request: pytest.FixtureRequest, make_ops: MakeOps) -> NativeOps:
    return make_ops(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def reference() -> TorchOps:
    return TorchOps(torch.float32)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def tolerance_for(ops: NativeOps, dtype: torch.dtype) -> float:
    """Where the CPU multiplies bf16, activations are rounded to it before the product."""
    return 1e-2 if dtype == torch.bfloat16 and "bf16" in ops.name else 2e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(64, 96), (770, 33), (7, 5), (1, 1), (1153, 256), (384, 2050)]
)
@pytest.mark.parametrize("rows", [1, 2, 5, 12, 13, 31, 200])
def test_linear(ops: NativeOps, dtype: torch.dtype, in_features: int, out_features: int, rows: int) -> None:
    weight, bias = torch.randn(out_features, in_features).to(dtype), torch.randn(out_features).to(dtype)
    x = torch.randn(rows, in_features)
    for given_bias in (None, bias):
        expected = torch.nn.functional.linear(x, weight.float(), None if given_bias is None else bias.float())
        assert_near(ops.linear(x, ops.pack_linear(weight, given_bias)), expected, tolerance_for(ops, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rowwise_operations(ops: NativeOps, dtype: torch.dtype) -> None:
    for rows, hidden in ((1, 8), (3, 75), (70, 768)):
        x, residual = torch.randn(rows, hidden), torch.randn(rows, hidden)
        weight, bias = torch.randn(hidden).to(dtype), torch.randn(hidden).to(dtype)
        table, ids = torch.randn(50, hidden).to(dtype), torch.randint(0, 50, (rows,))
        plain = reference()
        assert torch.equal(ops.embedding(ids, table), table[ids].float())
        assert_near(ops.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight.float(), 1e-5))
        for add_norm in ("rms", "layer"):
            mine, theirs = residual.clone(), residual.clone()
            if add_norm == "rms":
                normed = ops.add_rms_norm(x, mine, weight, 1e-5)
                expected = plain.add_rms_norm(x, theirs, weight.float(), 1e-5)
            else:
                normed = ops.add_layer_norm(x, mine, weight, bias, 1e-5)
                expected = plain.add_layer_norm(x, theirs, weight.float(), bias.float(), 1e-5)
            assert torch.equal(mine, theirs)
            assert_near(normed, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_features", "inner"), [(64, 96), (770, 33), (1, 1), (75, 250)])
@pytest.mark.parametrize("rows", [1, 5, 13, 200])
def test_gated_linear(ops: NativeOps, dtype: torch.dtype, in_features: int, inner: int, rows: int) -> None:
    weight, bias = torch.randn(2 * inner, in_features).to(dtype), torch.randn(2 * inner).to(dtype)
    x, plain = torch.randn(rows, in_features), reference()
    for given_bias in (None, bias):
        bias32 = None if given_bias is None else given_bias.float()
        expected = plain.gated_linear(x, plain.pack_gated(weight.float(), bias32))
        actual = ops.gated_linear(x, ops.pack_gated(weight, given_bias))
        assert_near(actual, expected, tolerance_for(ops, dtype))


def test_gate_far_from_zero(ops: NativeOps) -> None:
    """Where the exponential is out of range, silu is the gate itself or nothing."""
    x = torch.tensor([[-1e5], [-90.0], [-20.0], [0.0], [20.0], [90.0], [1e5]])
    packed = ops.pack_gated(torch.ones(2, 1), torch.tensor([0.0, 3.0]))
    expected = torch.nn.functional.silu(x) * (x + 3.0)
    torch.testing.assert_close(ops.gated_linear(x, packed), expected, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Step:
    """Sequences (new tokens, context) over a shuffled pool whose unused slots hold NaN, as memory may."""

    heads: HeadShape
    meta: AttentionMeta
    positions: Tensor
    slots: Tensor
    kv: Tensor

    @staticmethod
    def make(lengths: list[tuple[int, int]], heads: HeadShape, block_size: int, dtype: torch.dtype) -> "Step":
        blocks_of = [-(-context // block_size) for _, context in lengths]
        order = torch.randperm(sum(blocks_of) + 3).tolist()
        tables = torch.zeros(len(lengths), max(blocks_of) + 1, dtype=torch.int32)
        kv = torch.full((2, len(order), heads.num_kv_heads, block_size, heads.head_dim), torch.nan)
        positions, slots, starts = [], [], [0]
        for row, (new, context) in enumerate(lengths):
            tables[row, : blocks_of[row]] = torch.tensor([order.pop() for _ in range(blocks_of[row])])
            for position in range(context):
                block, offset = int(tables[row, position // block_size]), position % block_size
                kv[:, block, :, offset] = torch.randn(2, heads.num_kv_heads, heads.head_dim)
                if position >= context - new:
                    positions.append(position)
                    slots.append(block * block_size + offset)
            starts.append(starts[-1] + new)
        contexts = [context for _, context in lengths]
        meta = AttentionMeta(
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=tables,
            query_starts_host=tuple(starts),
            context_lens_host=tuple(contexts),
            num_decodes=sum(new == 1 for new, _ in lengths),
        )
        return Step(heads, meta, torch.tensor(positions), torch.tensor(slots), kv.to(dtype))


MIXED = [(1, 1), (1, 17), (1, 300), (40, 40), (5, 140), (130, 390), (129, 129)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 20, 150])
@pytest.mark.parametrize(
    ("heads", "block_size"),
    [(HeadShape(6, 2, 64), 16), (HeadShape(4, 4, 20), 5), (HeadShape(14, 2, 128), 32), (HeadShape(3, 1, 7), 1)],
)
def test_paged_attention(
    ops: NativeOps, dtype: torch.dtype, window: int | None, heads: HeadShape, block_size: int
) -> None:
    step = Step.make(MIXED, heads, block_size, dtype)
    q = torch.randn(len(step.positions), heads.num_heads, heads.head_dim)
    actual = ops.paged_attention(q, step.kv, step.meta, heads, 0.3, window)
    expected = reference().paged_attention(q, step.kv.float(), step.meta, heads, 0.3, window)
    assert_near(actual, expected, tolerance_for(ops, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_rope_and_cache(ops: NativeOps, dtype: torch.dtype, with_norms: bool, rotary: bool) -> None:
    heads = HeadShape(6, 2, 10)
    step = Step.make(MIXED, heads, 4, dtype)
    qkv = torch.randn(len(step.positions), (6 + 2 * 2) * 10)
    cos_sin = torch.randn(400, 10) if rotary else None
    norms = [torch.randn(10).to(dtype) for _ in range(2)] if with_norms else [None, None]
    norms32 = [None if norm is None else norm.float() for norm in norms]
    mine, theirs = step.kv.clone(), step.kv.clone()
    expected = reference().rope_and_cache(qkv.clone(), cos_sin, step.positions, step.slots, theirs, heads, *norms32)
    actual = ops.rope_and_cache(qkv.clone(), cos_sin, step.positions, step.slots, mine, heads, *norms)
    assert_near(actual, expected)
    torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-2, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_product_does_not_depend_on_the_batch(make_ops: MakeOps, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(520, 900).to(dtype), torch.randn(520)
    x = torch.randn(230, 900)
    one, three = make_ops(1), make_ops(3)
    packed, gated = one.pack_linear(weight, bias), one.pack_gated(weight, bias)
    whole, whole_gated = one.linear(x, packed), one.gated_linear(x, gated)
    for rows in (1, 2, 3, 4, 6, 7, 11, 12, 13, 25, 100, 230):
        for some in (one, three):
            assert torch.equal(some.linear(x[:rows].clone(), packed), whole[:rows]), rows
            assert torch.equal(some.gated_linear(x[:rows].clone(), gated), whole_gated[:rows]), rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 100])
def test_a_tokens_attention_does_not_depend_on_chunks_or_batch(
    make_ops: MakeOps, dtype: torch.dtype, window: int | None
) -> None:
    """A prompt in one chunk, its last tokens as a chunk, and its last token decoded: the same bits."""
    heads, block_size, length = HeadShape(6, 2, 64), 16, 333
    one, three = make_ops(1), make_ops(3)
    step = Step.make([(length, length), (70, 90)], heads, block_size, dtype)
    q = torch.randn(len(step.positions), heads.num_heads, heads.head_dim)
    whole = one.paged_attention(q, step.kv, step.meta, heads, 0.2, window)
    assert torch.equal(three.paged_attention(q, step.kv, step.meta, heads, 0.2, window), whole)
    for first, last in ((332, 333), (300, 333), (0, 1), (127, 128), (128, 130), (100, 301)):
        meta = AttentionMeta(
            query_starts=torch.tensor([0, last - first], dtype=torch.int32),
            context_lens=torch.tensor([last], dtype=torch.int32),
            block_tables=step.meta.block_tables[:1],
            query_starts_host=(0, last - first),
            context_lens_host=(last,),
            num_decodes=int(last - first == 1),
        )
        part = one.paged_attention(q[first:last].clone(), step.kv, meta, heads, 0.2, window)
        assert torch.equal(part, whole[first:last]), (first, last)
