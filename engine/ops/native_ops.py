"""`Ops` in C++ kernels for CPUs: weights and KV in bf16 or float32, activations in float32.

Beyond what `Ops` promises, a row's result depends on that row alone, to the last bit: neither on the batch, nor on how
a prompt was cut into chunks, nor on the number of threads.
"""

import ctypes
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.core.errors import InternalError
from tandem.engine.ops.huge_pages import HugePageArena
from tandem.engine.ops.interface import AttentionMeta, HeadShape, PackedLinear
from tandem.engine.ops.native_library import NativeUnavailableError

_PANEL = 32  # columns of a packed panel, as in engine/native/gemm.h
# Limits of the attention kernel's buffers, as in engine/native/attention.h: elements of a head, and query heads that
# share a key/value head.
MAX_HEAD_DIM = 256
MAX_HEADS_PER_KV_HEAD = 96
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class NativeLinear(PackedLinear):
    """The weight in panels of 32 outputs, see engine/native/gemm.h; `gated`: panels of gate and of up alternate.
    `bias`, float32, is in the panels' order."""

    in_features: int
    out_features: int
    panels: Tensor
    bias: Tensor | None
    gated: bool


class NativeOps:
    """Implements `Ops`. Not thread-safe; the kernels run on `num_threads` threads, one of which is the caller's."""

    activation_dtype = torch.float32

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        """Raises NativeUnavailableError where the system does not have the threads or their memory."""
        if num_threads < 1:
            raise InternalError("An engine computes on at least one thread")
        self._library = library
        self._context = library.tandem_create(num_threads)
        if self._context is None:
            raise NativeUnavailableError(f"{num_threads} threads or their memory are not to be had")
        self._arena = HugePageArena()
        weakref.finalize(self, library.tandem_destroy, self._context)
        self.name = f"native ({library.tandem_instructions().decode()})"

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        return self._pack(weight, None if bias is None else _in_panels(bias), out_features=len(weight), gated=False)

    def pack_gated(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        inner = len(weight) // 2
        gate_and_up = torch.stack([_in_panels(half) for half in weight.chunk(2)], dim=1).flatten(0, 2)
        if bias is not None:
            bias = torch.stack([_in_panels(half) for half in bias.chunk(2)], dim=1)
        return self._pack(gate_and_up, bias, out_features=inner, gated=True)

    def _pack(self, weight: Tensor, bias: Tensor | None, out_features: int, gated: bool) -> PackedLinear:
        """weight [rows, in_features]; `bias` in the order of the panels and padded to whole panels."""
        weight = _checked(weight.contiguous(), *_DTYPES)
        rows, in_features = weight.shape
        num_panels, num_pairs = -(-rows // _PANEL), -(-in_features // 2)
        panels = self._arena.empty(num_panels * num_pairs * 2 * _PANEL, weight.dtype)
        self._library.tandem_pack(weight.data_ptr(), _is_bf16(weight), rows, in_features, panels.data_ptr())
        bias32 = None if bias is None else bias.detach().to(torch.float32, copy=True).contiguous()
        return NativeLinear(in_features, out_features, panels, bias32, gated)

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        return self._multiply(x, packed, gated=False)

    def gated_linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        return self._multiply(x, packed, gated=True)

    def _multiply(self, x: Tensor, packed: PackedLinear, gated: bool) -> Tensor:
        if not isinstance(packed, NativeLinear) or packed.gated != gated:
            raise InternalError("A native kernel got a weight that was packed for another one")
        _checked(x, torch.float32)
        if x.shape[1] != packed.in_features:
            raise InternalError(f"A weight for {packed.in_features} features got {x.shape[1]}")
        y = torch.empty(x.shape[0], packed.out_features)
        self._library.tandem_linear(
            self._context,
            packed.panels.data_ptr(),
            _pointer(packed.bias),
            _is_bf16(packed.panels),
            packed.gated,
            packed.out_features,
            packed.in_features,
            x.data_ptr(),
            x.shape[0],
            y.data_ptr(),
        )
        return y

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        _checked(token_ids, torch.int64)
        _checked(weight, *_DTYPES)
        y = torch.empty(token_ids.shape[0], weight.shape[1])
        self._library.tandem_embedding(
            self._context,
            token_ids.data_ptr(),
            token_ids.shape[0],
            weight.data_ptr(),
            _is_bf16(weight),
            weight.shape[1],
            y.data_ptr(),
        )
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._rms_norm(x, None, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._rms_norm(x, _checked(residual, torch.float32), weight, eps)

    def _rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        shape = _checked(x, torch.float32).shape
        if _checked(weight, *_DTYPES).shape != shape[1:] or (residual is not None and residual.shape != shape):
            raise _wrong_shapes(x, residual, weight)
        y = torch.empty_like(x)
        self._library.tandem_rms_norm(
            self._context,
            x.data_ptr(),
            _pointer(residual),
            weight.data_ptr(),
            _is_bf16(weight),
            eps,
            x.shape[0],
            x.shape[1],
            y.data_ptr(),
        )
        return y

    def add_layer_norm(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        shape = _checked(x, torch.float32).shape
        _checked(residual, torch.float32)
        _checked(weight, *_DTYPES)
        _checked(bias, weight.dtype)
        if residual.shape != shape or weight.shape != shape[1:] or bias.shape != shape[1:]:
            raise _wrong_shapes(x, residual, weight, bias)
        y = torch.empty_like(x)
        self._library.tandem_add_layer_norm(
            self._context,
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            bias.data_ptr(),
            _is_bf16(weight),
            eps,
            x.shape[0],
            x.shape[1],
            y.data_ptr(),
        )
        return y

    def rope_and_cache(
        self,
        qkv: Tensor,
        cos_sin: Tensor | None,
        positions: Tensor,
        slots: Tensor,
        kv_layer: Tensor,
        heads: HeadShape,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        """See `Ops`; the result is a view of `qkv`, which is overwritten."""
        num_tokens, width = _checked(qkv, torch.float32).shape
        _checked(positions, torch.int64)
        _checked(slots, torch.int64)
        if width != heads.q_size + 2 * heads.kv_size or not len(positions) == len(slots) == num_tokens:
            raise _wrong_shapes(qkv, positions, slots)
        if cos_sin is not None and _checked(cos_sin, torch.float32).shape[1] != heads.head_dim:
            raise _wrong_shapes(cos_sin)
        norm_is_bf16 = False
        for norm in (q_norm, k_norm):
            if norm is not None:
                norm_is_bf16 = bool(_is_bf16(_checked(norm, *_DTYPES)))
                if len(norm) != heads.head_dim:
                    raise _wrong_shapes(norm)
        self._library.tandem_rope_and_cache(
            self._context,
            qkv.data_ptr(),
            qkv.shape[0],
            _pointer(cos_sin),
            positions.data_ptr(),
            slots.data_ptr(),
            *_kv_arguments(kv_layer, heads),
            _pointer(q_norm),
            _pointer(k_norm),
            norm_is_bf16,
            eps,
        )
        return qkv[:, : heads.q_size].view(-1, heads.num_heads, heads.head_dim)

    def paged_attention(
        self,
        q: Tensor,
        kv_layer: Tensor,
        meta: AttentionMeta,
        heads: HeadShape,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        if q.dtype != torch.float32 or q.stride()[1:] != (heads.head_dim, 1):  # only the tokens' stride is free
            raise InternalError(f"The attention kernel cannot read queries of {q.dtype} with strides {q.stride()}")
        num_sequences = len(meta.context_lens_host)
        starts, lens = _checked(meta.query_starts, torch.int32), _checked(meta.context_lens, torch.int32)
        tables = _checked(meta.block_tables, torch.int32)
        if (
            q.shape != (meta.query_starts_host[-1], heads.num_heads, heads.head_dim)
            or not len(starts) - 1 == len(lens) == len(tables) == num_sequences
        ):
            raise _wrong_shapes(q, starts, lens, tables)
        out = torch.empty(q.shape[0], heads.q_size)
        self._library.tandem_attention(
            self._context,
            q.data_ptr(),
            q.stride(0),
            *_kv_arguments(kv_layer, heads),
            meta.query_starts.data_ptr(),
            meta.context_lens.data_ptr(),
            meta.block_tables.data_ptr(),
            meta.block_tables.stride(0),
            num_sequences,
            scale,
            sliding_window or 0,
            out.data_ptr(),
        )
        return out


def _in_panels(rows: Tensor) -> Tensor:
    """[n, ...] -> [panels, 32, ...], padded with zeros."""
    missing = -len(rows) % _PANEL
    padded = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
    return padded.view(-1, _PANEL, *rows.shape[1:])


def _checked(tensor: Tensor, *dtypes: torch.dtype) -> Tensor:
    """The kernels take pointers. Raises InternalError for a tensor that they would read or write wrongly."""
    if not (tensor.is_cpu and tensor.dtype in dtypes and tensor.is_contiguous()):
        raise InternalError(f"A native kernel needs contiguous {dtypes} on a CPU, not {tensor.dtype} {tensor.stride()}")
    return tensor


def _wrong_shapes(*tensors: Tensor | None) -> InternalError:
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors if tensor is not None)
    return InternalError(f"A native kernel got tensors whose shapes do not fit: {shapes}")


def _kv_arguments(kv_layer: Tensor, heads: HeadShape) -> tuple[int, ...]:
    """The kernels' arguments from `kv_layer` to `head_dim`. Raises InternalError for heads beyond their buffers."""
    if heads.head_dim > MAX_HEAD_DIM or not heads.num_kv_heads <= heads.num_heads <= (
        MAX_HEADS_PER_KV_HEAD * heads.num_kv_heads
    ):
        raise InternalError(f"The attention kernel cannot compute {heads}")
    _, num_blocks, num_kv_heads, block_size, head_dim = _checked(kv_layer, *_DTYPES).shape
    if (len(kv_layer), num_kv_heads, head_dim) != (2, heads.num_kv_heads, heads.head_dim):
        raise _wrong_shapes(kv_layer)
    shape = (num_blocks, block_size, heads.num_heads, num_kv_heads, head_dim)
    return kv_layer.data_ptr(), _is_bf16(kv_layer), *shape


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _is_bf16(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)
