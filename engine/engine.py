"""The engine: token ids in, token ids out. One model on one device with one pool of KV blocks."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tandem.core.errors import ConfigError
from tandem.core.kv_layout import KvLayout
from tandem.core.model_spec import ModelSpec
from tandem.core.request import SamplingParams
from tandem.engine.batching import pack
from tandem.engine.checkpoint import Checkpoint, open_checkpoint
from tandem.engine.config import Capacity, EngineConfig
from tandem.engine.device import choose_device, choose_dtype, choose_threads
from tandem.engine.models.base import Model
from tandem.engine.models.llama import load_llama
from tandem.engine.models.opt import load_opt
from tandem.engine.ops.choose import choose_ops
from tandem.engine.ops.interface import HeadShape
from tandem.engine.rope import difference_from_transformers
from tandem.engine.sampler import sample_slices
from tandem.engine.step import SampleRequest, SequenceSlice, StepHandle, StepOutput
from tandem.engine.weights import WeightLoader

_log = logging.getLogger(__name__)


class Engine:
    """Computes steps. The caller owns the blocks and decides what a step holds; the engine keeps no sequences.

    A step has two halves: `launch` runs the model, `collect` draws tokens from the result. A rank that only computes
    (a follower, a stage of a pipeline) calls `forward` and neither of them.

    `pool` is the KV pool as a tensor of `layout.shape`; `ops_name` names the implementation of `Ops`. Not thread-safe:
    one thread makes all calls.
    """

    def __init__(
        self, spec: ModelSpec, layout: KvLayout, pool: Tensor, model: Model, max_model_len: int, ops_name: str
    ) -> None:
        self.spec = spec
        self.layout = layout
        self.pool = pool
        self.ops_name = ops_name
        self._model = model
        self._max_model_len = max_model_len
        # On CUDA tokens are drawn on a stream of their own, so that `collect` does not wait for steps launched later.
        self._sampling_stream = torch.cuda.Stream(pool.device) if pool.is_cuda else None  # type: ignore[no-untyped-call]
        self._last_launched = 0
        self._last_collected = 0

    def capacity(self) -> Capacity:
        return Capacity(self.layout.num_blocks, self.layout.block_size, self._max_model_len)

    @torch.inference_mode()
    def forward(self, slices: Sequence[SequenceSlice]) -> Tensor:
        """Compute all slices together, prompt chunks and single tokens in any mixture, and write their KV to the pool.

        Returns the hidden states [rows, hidden] that sampling needs: `num_wanted_rows(part)` of each slice, in the
        order of `slices`. On CUDA the work is enqueued on the current stream, and nothing waits for the device.
        Raises InternalError for a position, block or token id that does not exist. The caller guarantees that no two
        slices write the same block.
        """
        batch = pack(slices, self.layout, self.spec.vocab_size, self._max_model_len, self.pool.device)
        return self._model.forward(batch, self.pool)

    def launch(self, slices: Sequence[SequenceSlice]) -> StepHandle:
        """Start a step: the forward pass of `slices`. They and their histories must not change until `collect`.

        Raises what `forward` raises, and RuntimeError or MemoryError where memory is short; there is no handle then.
        More steps may be launched before this one is collected, as long as their tokens do not depend on it.
        """
        hidden = self.forward(slices)
        forward_done = torch.cuda.current_stream(self.pool.device).record_event() if self.pool.is_cuda else None
        self._last_launched += 1
        return StepHandle(self._last_launched, slices, hidden, forward_done)

    @torch.inference_mode()
    def collect(self, handle: StepHandle) -> StepOutput:
        """Finish a step: draw its tokens and bring them to the host. The step's KV is in the pool afterwards.

        Handles are collected in the order of their launch, each at most once. Raises RuntimeError or MemoryError where
        memory is short or the device failed; the step is lost then.
        """
        assert self._last_collected < handle.number, "steps are collected in the order of their launch"
        self._last_collected = handle.number
        if handle.forward_done is None:
            return sample_slices(handle.slices, handle.hidden, self._model.logits)
        handle.forward_done.synchronize()
        # Results end on the host, so nothing on this stream reads `hidden` once its memory is free again.
        with torch.cuda.stream(self._sampling_stream):
            return sample_slices(handle.slices, handle.hidden, self._model.logits)

    def step(self, slices: Sequence[SequenceSlice]) -> StepOutput:
        """`launch` and `collect` in a row."""
        return self.collect(self.launch(slices))

    def warm_up(self) -> None:
        """Run one small prompt and one decode step, so that the first request does not pay for lazy initialisation.

        Overwrites block 0; call it before any sequence has blocks in the pool.
        """
        request = SampleRequest(SamplingParams(temperature=0.0), position=1, history=(), num_prompt_tokens=1)
        length = min(self.layout.block_size, self._max_model_len) - 1
        if length > 0:
            self.step([SequenceSlice([0] * length, 0, [0], request)])
        self.step([SequenceSlice([0], length, [0], request)])
        self.pool[:, :, 0].zero_()

    def close(self) -> None:
        """Release weights and pool. No method may be called afterwards."""
        del self._model, self.pool


def load_engine(config: EngineConfig, allocate_pool: Callable[[int], Tensor] | None = None) -> Engine:
    """Load a checkpoint and allocate its KV pool. Sets the process's number of torch threads.

    `allocate_pool(pool_bytes)` returns the uint8 tensor [pool_bytes] that holds the KV pool, on the engine's device;
    None takes torch's memory. Raises CheckpointError or ConfigError with one sentence for the user.
    """
    checkpoint = open_checkpoint(config.model_path)
    spec = checkpoint.spec
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, spec, device)
    max_model_len = _max_model_len(config, spec)
    long_factors = spec.rope is not None and spec.rope.needs_long_factors(max_model_len)
    layout = _layout(config, checkpoint, dtype, long_factors)
    if spec.rope is not None and (difference := difference_from_transformers(spec.rope, max_model_len)):
        _log.warning("%s", difference)
    # No sequence is longer than the pool, and no table of positions need be.
    max_positions = min(max_model_len, layout.num_blocks * layout.block_size)
    num_threads = choose_threads(config.num_threads)
    torch.set_num_threads(num_threads)
    heads = HeadShape(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    ops = choose_ops(config.ops, dtype, device, heads, num_threads)
    with torch.inference_mode():
        loader = WeightLoader(checkpoint, dtype, device)
        model = (
            load_opt(spec, loader, ops)
            if spec.family == "opt"
            else load_llama(spec, loader, ops, max_positions, long_factors)
        )
        loader.finish()
    # Not in inference mode: KV transfers write into the pool too.
    if allocate_pool is None:
        pool = torch.zeros(layout.shape, dtype=dtype, device=device)
    else:
        pool = allocate_pool(layout.pool_bytes).view(dtype).view(layout.shape)
    return Engine(spec, layout, pool, model, max_positions, ops.name)


def _max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    limit = spec.max_context_tokens
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(f"max_model_len {config.max_model_len} is more than the model's context of {limit} tokens")
    return config.max_model_len or limit


def _layout(config: EngineConfig, checkpoint: Checkpoint, dtype: torch.dtype, long_factors: bool) -> KvLayout:
    spec = checkpoint.spec
    block_bytes = spec.kv_bytes_per_token(dtype.itemsize) * config.block_size
    num_blocks = config.kv_memory_bytes // block_bytes
    if num_blocks < 1:
        raise ConfigError(f"kv_memory of {config.kv_memory_bytes} bytes holds no block of {block_bytes} bytes")
    return KvLayout(
        num_layers=spec.num_layers,
        num_blocks=num_blocks,
        num_kv_heads=spec.num_kv_heads,
        block_size=config.block_size,
        head_dim=spec.head_dim,
        dtype=str(dtype).removeprefix("torch."),
        weights_hash=checkpoint.weights_hash,
        rope_factors="long" if long_factors else "",
    )
