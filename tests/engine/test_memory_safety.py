"""Checks on which the safety of memory rests: they raise under `python -O` too, and short memory is an error."""

import subprocess
import sys
from pathlib import Path

import pytest

from tandem.engine.ops.native_library import NativeUnavailableError, load_native_library

_ROOT = Path(__file__).parents[2]
# Compiles Tandem's modules, and no others, as -O does. With -O itself torch is compiled too, which takes a minute.
_WITHOUT_ASSERTIONS = """
import sys
from importlib.machinery import PathFinder, SourceFileLoader

class Loader(SourceFileLoader):
    def get_code(self, fullname):
        return compile(self.get_data(self.path), self.path, "exec", dont_inherit=True, optimize=1)

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target) if name.startswith("tandem") else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(name, spec.origin)
        return spec

sys.meta_path.insert(0, Finder)
"""
_CHECKS = """
import asyncio, torch
from tandem.core.errors import InternalError
from tandem.core.kv_layout import KvLayout
from tandem.engine.batching import pack
from tandem.engine.step import SequenceSlice
from tandem.kv_transfer.receiver import KvReceiver

from tandem.core.parallel import ParallelShape

ParallelShape(tp=0)  # an assertion of an internal invariant, which is not executed
layout = KvLayout(1, 10, 1, 4, 2, "float32", "")

def refused(call):
    try:
        call()
    except InternalError:
        return
    raise SystemExit("not refused")

for part in (
    SequenceSlice([1], 4, [3]), SequenceSlice([1], 0, [10]), SequenceSlice([1], 0, [-1]), SequenceSlice([8], 0, [0]),
    SequenceSlice([-1], 0, [0]), SequenceSlice([1, 2], 11, [0, 1, 2, 3]), SequenceSlice([1], -1, [0]),
    SequenceSlice([], 3, [0]),
):
    refused(lambda: pack([part], layout, vocab_size=8, max_model_len=12, device=torch.device("cpu")))

receiver = KvReceiver(layout, [torch.zeros(layout.pool_bytes, dtype=torch.uint8)], "decode")
for blocks in ([1, 1], [0], [0, 10], [0, -1]):
    refused(lambda: asyncio.run(receiver.fetch(None, "r", 0, [1, 2, 3, 4, 5], blocks, 1e9)))
"""
_KERNEL_CHECKS = """
from tandem.engine.ops.interface import AttentionMeta, HeadShape
from tandem.engine.ops.native_library import load_native_library
from tandem.engine.ops.native_ops import NativeOps

ops = NativeOps(load_native_library(), 1)
refused(lambda: NativeOps(load_native_library(), 0))
weight = torch.randn(64, 32)
x = torch.randn(2, 32)
linear, gated = ops.pack_linear(weight, None), ops.pack_gated(weight, None)
refused(lambda: ops.linear(x, gated))
refused(lambda: ops.gated_linear(x, linear))
refused(lambda: ops.linear(x[:, :31].contiguous(), linear))
refused(lambda: ops.linear(x, None))
refused(lambda: ops.rms_norm(x, weight[0, :31].contiguous(), 1e-5))
refused(lambda: ops.add_rms_norm(x, x[:1], weight[0], 1e-5))
refused(lambda: ops.add_layer_norm(x, x.clone(), weight[0], weight[0, :9].contiguous(), 1e-5))
refused(lambda: ops.embedding(torch.tensor([1], dtype=torch.int32), weight))
heads, kv, one = HeadShape(2, 1, 2), torch.zeros(2, 10, 1, 4, 2), torch.tensor([0])
refused(lambda: ops.rope_and_cache(torch.zeros(1, 7), None, one, one, kv, heads))
refused(lambda: ops.rope_and_cache(torch.zeros(1, 8), None, one, torch.tensor([0, 1]), kv, heads))
refused(lambda: ops.rope_and_cache(torch.zeros(1, 8), torch.zeros(4, 4), one, one, kv, heads))
refused(lambda: ops.rope_and_cache(torch.zeros(1, 8), None, one, one, kv[:1], heads))

def attention(q, heads, kv):
    number = lambda *values: torch.tensor(values, dtype=torch.int32)
    meta = AttentionMeta(number(0, 1), number(1), number(0).view(1, 1), (0, 1), (1,), 1)
    return ops.paged_attention(q, kv, meta, heads, 1.0, None)

attention(torch.zeros(1, 2, 2), heads, kv)
refused(lambda: attention(torch.zeros(2, 2, 2), heads, kv))
refused(lambda: attention(torch.zeros(1, 97, 2), HeadShape(97, 1, 2), kv))
refused(lambda: attention(torch.zeros(1, 2, 258), HeadShape(2, 1, 258), torch.zeros(2, 10, 1, 4, 258)))
"""
_SHORT_MEMORY = """
import resource, torch
from pathlib import Path
from tandem.engine.ops.native_library import NativeUnavailableError, load_native_library
from tandem.engine.ops.native_ops import NativeOps

ops = NativeOps(load_native_library(), 1)
weight, x = torch.randn(1, 1_000_000), torch.randn(1, 1_000_000)
packed, small = ops.pack_linear(weight, None), ops.pack_linear(weight[:, :100].contiguous(), None)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
unlimited = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), unlimited[1]))
try:
    ops.linear(x, packed)
except MemoryError as error:
    print(error)
ops.linear(x[:, :100].contiguous(), small)
try:
    NativeOps(load_native_library(), 1000)
except NativeUnavailableError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, unlimited)
torch.testing.assert_close(ops.linear(x, packed), torch.nn.functional.linear(x, weight), rtol=1e-3, atol=2.0)
"""


def _run(*command: str) -> str:
    result = subprocess.run([sys.executable, *command], cwd=_ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _needs_a_compiler() -> None:
    try:
        load_native_library()
    except NativeUnavailableError as error:
        pytest.skip(str(error))


def test_memory_is_guarded_without_assertions() -> None:
    _needs_a_compiler()
    _run("-c", _WITHOUT_ASSERTIONS + _CHECKS + _KERNEL_CHECKS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_is_guarded_under_python_o() -> None:
    _needs_a_compiler()
    _run("-O", "-c", _CHECKS + _KERNEL_CHECKS)


def test_a_kernel_without_memory_raises_and_the_next_one_computes() -> None:
    _needs_a_compiler()
    lines = _run("-c", _SHORT_MEMORY).splitlines()
    assert lines == [
        "A native kernel has no memory for its working data",
        "1000 threads or their memory are not to be had",
    ]
