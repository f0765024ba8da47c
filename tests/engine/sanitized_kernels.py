"""Runs the native kernels, built with AddressSanitizer and UndefinedBehaviorSanitizer, on shapes at their limits.

    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \\
        python -m tests.engine.sanitized_kernels CACHE_FOLDER all|fault [FLAG...]

FLAGs are the compiler's for a processor, by default -march=native. Every tensor is an allocation of its own, so that a
read or a write beyond it ends the process with a report. "fault" does that on purpose. Prints the number of calls.
"""

import itertools
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tandem.core.errors import InternalError
from tandem.engine.ops.interface import AttentionMeta, HeadShape
from tandem.engine.ops.native_library import load_native_library
from tandem.engine.ops.native_ops import MAX_HEAD_DIM, MAX_HEADS_PER_KV_HEAD, NativeOps

_FLAGS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_DTYPES = (torch.float32, torch.bfloat16)


class _ExactMemory:
    """In the place of the arena of huge pages, which has no red zones between tensors."""

    def empty(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(num_elements, dtype=dtype)


def _refused(call: Callable[[], object]) -> None:
    try:
        call()
    except InternalError:
        return
    raise AssertionError("a kernel took what it cannot compute")


def _linear(ops: NativeOps, rng: random.Random) -> int:
    calls = 0
    inputs, outputs = (1, 2, 7, 31, 383, 384, 385, 768, 1153), (1, 31, 32, 33, 95, 128, 200)
    rows = (1, 2, 5, 6, 7, 11, 12, 13, 47, 48, 49, 130, 191, 192, 193, 385)
    for k, columns, dtype in itertools.product(inputs, outputs, _DTYPES):
        for gated in (False, True):
            weight = torch.randn(columns * (2 if gated else 1), k).to(dtype)
            bias = torch.randn(len(weight)).to(dtype) if rng.random() < 0.5 else None
            pack, run = (ops.pack_gated, ops.gated_linear) if gated else (ops.pack_linear, ops.linear)
            packed = pack(weight, bias)
            for count in rng.sample(rows, 4):
                run(torch.randn(count, k), packed)
                calls += 1
            other = ops.linear if gated else ops.gated_linear
            _refused(partial(other, torch.randn(1, k), packed))
            _refused(partial(run, torch.randn(1, k + 1), packed))
    return calls


def _rows(ops: NativeOps) -> int:
    calls = 0
    for rows, hidden, dtype in itertools.product((1, 3, 70), (1, 3, 15, 16, 17, 63, 64, 65, 770), _DTYPES):
        table, ids = torch.randn(9, hidden).to(dtype), torch.randint(0, 9, (rows,))
        ids[0], ids[-1] = 0, 8
        weight, bias, x = table[0].clone(), table[1].clone(), torch.randn(rows, hidden)
        ops.embedding(ids, table)
        ops.rms_norm(x, weight, 1e-5)
        ops.add_rms_norm(x, torch.randn(rows, hidden), weight, 1e-5)
        ops.add_layer_norm(x, torch.randn(rows, hidden), weight, bias, 1e-5)
        calls += 4
        longer = torch.randn(hidden + 1).to(dtype)
        _refused(partial(ops.rms_norm, x, longer, 1e-5))
        _refused(partial(ops.add_rms_norm, x, torch.randn(rows + 1, hidden), weight, 1e-5))
    return calls


def _attention(ops: NativeOps, rng: random.Random) -> int:
    calls = 0
    groups = [(1, 1), (3, 3), (12, 2), (48, 1), (MAX_HEADS_PER_KV_HEAD, 1), (2 * MAX_HEADS_PER_KV_HEAD, 2)]
    dims = (1, 2, 7, 16, 31, 32, 33, 64, 255, MAX_HEAD_DIM)
    lengths = [(1, 1), (1, 255), (1, 256), (1, 257), (1, 700), (2, 2), (97, 97), (13, 300), (256, 256), (65, 600)]
    for (num_heads, num_kv_heads), dim, dtype in itertools.product(groups, dims, _DTYPES):
        heads, block_size = HeadShape(num_heads, num_kv_heads, dim), rng.choice((1, 3, 16, 256))
        chosen = rng.sample(lengths, 2)
        chosen.sort(key=lambda pair: pair[0] != 1)
        needed = [-(-context // block_size) for _, context in chosen]
        num_blocks = sum(needed)
        order = rng.sample(range(num_blocks), num_blocks)
        tables = torch.zeros(len(chosen), max(needed), dtype=torch.int32)
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for row, (new, context) in enumerate(chosen):
            tables[row, : needed[row]] = torch.tensor([order.pop() for _ in range(needed[row])])
            for position in range(context - new, context):
                positions.append(position)
                slots.append(int(tables[row, position // block_size]) * block_size + position % block_size)
            starts.append(starts[-1] + new)
        contexts = [context for _, context in chosen]
        meta = AttentionMeta(
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=tables,
            query_starts_host=tuple(starts),
            context_lens_host=tuple(contexts),
            num_decodes=sum(new == 1 for new, _ in chosen),
        )
        kv = torch.randn(2, num_blocks, num_kv_heads, block_size, dim).to(dtype)
        qkv = torch.randn(starts[-1], (num_heads + 2 * num_kv_heads) * dim)
        cos_sin = torch.randn(max(contexts), dim) if dim % 2 == 0 else None
        norm = torch.randn(dim).to(dtype) if rng.random() < 0.5 else None
        q = ops.rope_and_cache(
            qkv, cos_sin, torch.tensor(positions), torch.tensor(slots), kv, heads, q_norm=norm, k_norm=norm
        )
        for window in (None, rng.choice((1, 20, 255, 256, 257, 10_000))):
            ops.paged_attention(q, kv, meta, heads, 0.3, window)
        calls += 3
        for beyond in (
            HeadShape((MAX_HEADS_PER_KV_HEAD + 1) * num_kv_heads, num_kv_heads, dim),
            HeadShape(num_heads, num_kv_heads, MAX_HEAD_DIM + 1),
            HeadShape(num_heads, num_kv_heads + 1, dim),
        ):
            _refused(partial(ops.paged_attention, q, kv, meta, beyond, 0.3, None))
    return calls


def main() -> None:
    flags = tuple(sys.argv[3:]) or ("-march=native",)
    library = load_native_library(Path(sys.argv[1]), (*flags, *_FLAGS))
    torch.manual_seed(0)
    rng, calls = random.Random(0), 0
    for num_threads in (1, 3):
        ops = NativeOps(library, num_threads)
        ops._arena = _ExactMemory()  # type: ignore[assignment]
        if sys.argv[2] == "fault":
            ops.embedding(torch.tensor([9]), torch.randn(9, 64))
        calls += _linear(ops, rng) + _rows(ops) + _attention(ops, rng)
    print(calls)


if __name__ == "__main__":
    main()
