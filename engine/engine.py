"""The engine: token ids in, token ids out. One model on one device with one pool of KV blocks."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.core.errors import ConfigError, InternalError
from tandem.core.kv_layout import KvLayout
from tandem.core.model_spec import ModelSpec
from tandem.core.parallel import ParallelShape, share
from tandem.core.request import SamplingParams
from tandem.engine.batching import pack
from tandem.engine.checkpoint import Checkpoint, open_checkpoint
from tandem.engine.collectives.interface import Collectives, NoCollectives
from tandem.engine.config import Capacity, EngineConfig
from tandem.engine.device import choose_device, choose_dtype, choose_threads
from tandem.engine.models.base import LayerHook, Model, StepBatch
from tandem.engine.models.llama import load_llama
from tandem.engine.models.opt import load_opt
from tandem.engine.ops.choose import choose_ops
from tandem.engine.ops.interface import HeadShape, Ops
from tandem.engine.rope import difference_from_transformers
from tandem.engine.sampler import inputs_of_logits, sample_slices
from tandem.engine.shard import Shard, shard_of
from tandem.engine.step import SampleRequest, SequenceSlice, StepHandle, StepOutput
from tandem.engine.weights import WeightLoader

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Which rank of an instance an engine is, and its connections to the other ranks.

    `announce(step, slices)` tells the other ranks to compute a step; only rank 0 of several ranks has it.
    `hashes_files`: this rank reads the whole checkpoint once for `KvLayout.weights_hash`, which else is empty.
    """

    shape: ParallelShape
    rank: int
    collectives: Collectives
    announce: Callable[[int, Sequence[SequenceSlice]], None] | None = None
    hashes_files: bool = False


class Engine:
    """Computes steps. The caller owns the blocks and decides what a step contains; the engine keeps no sequences.

    A step has two halves: `launch` runs the model, `collect` samples tokens from the result. With several ranks the
    caller uses rank 0: `launch` announces the step to the other ranks, which `follow` it, and `collect` samples from
    the logits that the last stage sends. All ranks have the same number of blocks.

    `layout` describes the KV of the whole instance; `pool` is this rank's pool, of shape `layout.pool_of(rank).shape`.
    Hidden states have `activation_dtype`. Not thread-safe: one thread makes all calls.
    """

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        layout: KvLayout,
        pool: Tensor,
        model: Model,
        max_model_len: int,
        ops: Ops,
        place: RankPlace,
    ) -> None:
        self.spec = spec
        self.layout = layout
        self.pool = pool
        self.ops_name = ops.name
        self._shard = shard
        self._model = model
        self._max_model_len = max_model_len
        self.activation_dtype = ops.activation_dtype
        self._collectives = place.collectives
        self._announce = place.announce
        # On CUDA tokens are sampled on a separate stream, so that `collect` does not wait for steps launched later.
        self._sampling_stream = torch.cuda.Stream(pool.device) if pool.is_cuda else None  # type: ignore[no-untyped-call]
        self._last_launched = 0
        self._last_collected = 0
        # The last collected step that sampled a token: all ranks have computed it and all steps before it. And the last
        # collected step that sampled none: later stages may still compute it.
        self._last_drawn = 0
        self._last_undrawn = 0

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages: as many steps can be computed at once."""
        return self._shard.shape.pp

    @property
    def next_step(self) -> int:
        """The number of the step that is launched next."""
        return self._last_launched + 1

    def capacity(self) -> Capacity:
        return Capacity(self.layout.num_blocks, self.layout.block_size, self._max_model_len)

    @torch.inference_mode()
    def forward(self, slices: Sequence[SequenceSlice], layer_computed: LayerHook | None = None) -> Tensor:
        """Compute all slices together, prompt chunks and single tokens in any mixture, and write their KV to the pool.

        Returns the hidden states [rows, hidden] that sampling needs: `num_wanted_rows(part)` of each slice, in the
        order of `slices`. On CUDA the work is enqueued on the current stream, and nothing waits for the device.
        Raises InternalError for a position, block or token id that does not exist. The caller guarantees that no two
        slices write the same block.
        """
        return self._compute(self._pack(slices), layer_computed)

    def launch(self, slices: Sequence[SequenceSlice], layer_computed: LayerHook | None = None) -> StepHandle:
        """Start a step: the forward pass of `slices`. They and their histories must not change until `collect`.

        `layer_computed(n)` is called in this thread when the pools have the step's KV of the first n layers; with
        several stages, of the first stage's first n layers. It is never called on CUDA, where layers are only enqueued.
        More steps may be launched before this one is collected, if their tokens do not depend on it. Raises the errors
        of `forward`, and RuntimeError or MemoryError if memory is short. With several ranks any error ends the
        instance, and is an InternalError.
        """
        if self.pool.is_cuda:
            layer_computed = None
        if self._announce is None:
            hidden = self.forward(slices, layer_computed)
            self._last_launched += 1
        else:
            hidden = self._lead(slices, self._announce, layer_computed)
        forward_done = torch.cuda.current_stream(self.pool.device).record_event() if self.pool.is_cuda else None
        return StepHandle(self._last_launched, slices, hidden, forward_done)

    @torch.inference_mode()
    def collect(self, handle: StepHandle) -> StepOutput:
        """Finish a step: sample its tokens and copy them to the host. The step's KV is in the pool afterwards.

        Handles are collected in the order of their launch, each at most once. Raises RuntimeError or MemoryError if
        memory is short or the device has failed; the step has no result then.
        """
        assert self._last_collected < handle.number, "steps are collected in the order of their launch"
        self._last_collected = handle.number
        if any(part.sample is not None for part in handle.slices):
            self._last_drawn = handle.number
        else:
            self._last_undrawn = handle.number
        if handle.forward_done is None:
            return sample_slices(handle.slices, handle.hidden, self._logits)
        handle.forward_done.synchronize()
        # The results are copied to the host, so nothing on this stream reads `hidden` once its memory is free.
        with torch.cuda.stream(self._sampling_stream):
            return sample_slices(handle.slices, handle.hidden, self._logits)

    def step(self, slices: Sequence[SequenceSlice]) -> StepOutput:
        """`launch`, then `collect`."""
        return self.collect(self.launch(slices))

    @property
    def is_settled(self) -> bool:
        """Whether no rank computes a collected step any more. The ranks of one stage end a step together, and the last
        stage sends logits only after all other stages have ended the step."""
        return self._shard.shape.pp == 1 or self._last_undrawn <= self._last_drawn

    def settle(self) -> None:
        """Wait until no rank reads or writes blocks of the collected steps. Raises RankLostError.

        The caller needs this before a transfer writes into blocks of those steps: later stages may still compute a
        collected step that sampled no token. Call it while no step is under way, unless `is_settled`.
        """
        if self._announce is None or self.is_settled:
            return
        assert self._last_collected == self._last_launched, "no step is under way"
        shape = self._shard.shape
        self._last_launched += 1
        self._last_collected = self._last_launched
        self._announce(self._last_launched, ())
        for rank in range(shape.num_ranks - shape.tp, shape.num_ranks):
            self._collectives.receive(rank, (1,), torch.float32)
        self._last_drawn = self._last_launched

    @torch.inference_mode()
    def follow(self, number: int, slices: Sequence[SequenceSlice], layer_computed: LayerHook | None = None) -> None:
        """Compute this rank's part of a step that rank 0 has announced. `layer_computed(n)` is called when the step's
        KV of the stage's first n layers is in the pools, but not on CUDA. Raises InternalError for a step that is not
        the next one, and what `forward` raises."""
        if number != self._last_launched + 1:
            raise InternalError(f"step {number} was announced after step {self._last_launched}")
        self._last_launched = number
        if not slices:  # rank 0 waits in `settle`
            if self._shard.is_last_stage:
                self._collectives.send(0, torch.zeros(1, device=self.pool.device))
            return
        hidden = self._compute(self._pack(slices), None if self.pool.is_cuda else layer_computed)
        if self._shard.is_last_stage:
            for wanted in inputs_of_logits(slices, hidden):
                self._collectives.send(0, self._model.logits(wanted))

    def warm_up(self) -> None:
        """Run a small prompt and a decode step, so that lazy initialisation does not delay the first request.

        Overwrites block 0: call it before any sequence has blocks.
        """
        request = SampleRequest(SamplingParams(temperature=0.0), position=1, history=(), num_prompt_tokens=1)
        length = min(self.layout.block_size, self._max_model_len) - 1
        if length > 0:
            self.step([SequenceSlice([0] * length, 0, [0], request)])
        self.step([SequenceSlice([0], length, [0], request)])
        self.pool[:, :, 0].zero_()

    def close(self) -> None:
        """Release weights and pool. No method may be called afterwards."""
        self._collectives.close()
        del self._model, self.pool

    def _pack(self, slices: Sequence[SequenceSlice]) -> StepBatch:
        return pack(slices, self.layout, self.spec.vocab_size, self._max_model_len, self.pool.device)

    def _compute(self, batch: StepBatch, layer_computed: LayerHook | None = None) -> Tensor:
        """The hidden states [rows, hidden] of the batch; [rows, 0] on stages before the last."""
        shard, received = self._shard, None
        if not shard.is_first_stage:
            shape = (len(batch.token_ids), self.spec.hidden_size)
            received = self._collectives.receive(shard.rank - shard.shape.tp, shape, self.activation_dtype)
        hidden = self._model.forward(batch, self.pool, received, layer_computed)
        if shard.is_last_stage:
            return hidden
        self._collectives.send(shard.rank + shard.shape.tp, hidden)
        return hidden.new_empty(len(batch.token_ids) if batch.rows is None else len(batch.rows), 0)

    @torch.inference_mode()
    def _lead(
        self,
        slices: Sequence[SequenceSlice],
        announce: Callable[[int, Sequence[SequenceSlice]], None],
        layer_computed: LayerHook | None,
    ) -> Tensor:
        """`forward` on all ranks. An invalid step is refused before it is announced to the other ranks."""
        # With one stage, rank 0 would wait for the sums of a second step while the others wait to send logits.
        assert self._shard.shape.pp > 1 or self._last_collected == self._last_launched, "one step at a time"
        batch = self._pack(slices)
        self._last_launched += 1
        try:
            announce(self._last_launched, slices)
            return self._compute(batch, layer_computed)
        except (RuntimeError, MemoryError, OSError) as error:
            raise InternalError(f"rank 0 failed in step {self._last_launched}, and the others cannot go on") from error

    def _logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> float32 [n, vocab], of which each rank of the last stage computes a part."""
        shape = self._shard.shape
        if shape.num_ranks == 1:
            return self._model.logits(hidden)
        parts = [self._model.logits(hidden)] if shape.pp == 1 else []
        last_stage = shape.num_ranks - shape.tp
        for tp_rank in range(len(parts), shape.tp):
            width = len(share(self.spec.vocab_size, shape.tp, tp_rank))
            parts.append(self._collectives.receive(last_stage + tp_rank, (len(hidden), width), torch.float32))
        return torch.cat(parts, dim=1)


def load_engine(
    config: EngineConfig, allocate_pool: Callable[[int], Tensor] | None = None, place: RankPlace | None = None
) -> Engine:
    """Load one rank's part of a checkpoint and allocate its KV pool. Sets the process's number of torch threads.

    `place` None: the instance has one rank. `allocate_pool(pool_bytes)` returns the uint8 tensor [pool_bytes] that
    holds the KV pool, on the engine's device; None takes torch's memory. Raises CheckpointError or ConfigError with one
    sentence for the user.
    """
    place = place or RankPlace(ParallelShape(), 0, NoCollectives(), hashes_files=True)
    checkpoint = open_checkpoint(config.model_path, with_hash=place.hashes_files)
    spec = checkpoint.spec
    shard = shard_of(spec, place.shape, place.rank)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, spec, device)
    max_model_len = _max_model_len(config, spec)
    long_factors = spec.rope is not None and spec.rope.needs_long_factors(max_model_len)
    layout = _layout(config, checkpoint, place.shape, dtype, long_factors)
    if spec.rope is not None and (difference := difference_from_transformers(spec.rope, max_model_len)):
        _log.warning("%s", difference)
    # No sequence is longer than the pool, so tables of positions need not be longer either.
    max_positions = min(max_model_len, layout.num_blocks * layout.block_size)
    num_threads = choose_threads(config.num_threads)
    torch.set_num_threads(num_threads)
    heads = HeadShape(len(shard.heads), len(shard.kv_heads), spec.head_dim)
    ops = choose_ops(config.ops, dtype, device, heads, num_threads)
    with torch.inference_mode():
        loader = WeightLoader(checkpoint, dtype, device)
        model = (
            load_opt(spec, shard, loader, ops, place.collectives)
            if spec.family == "opt"
            else load_llama(spec, shard, loader, ops, place.collectives, max_positions, long_factors)
        )
        loader.finish()
    own = layout.pool_of(place.rank)
    # Not in inference mode: KV transfers write into the pool too.
    if allocate_pool is None:
        pool = torch.zeros(own.shape, dtype=dtype, device=device)
    else:
        pool = allocate_pool(own.pool_bytes).view(dtype).view(own.shape)
    return Engine(spec, shard, layout, pool, model, max_positions, ops, place)


def _max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    limit = spec.max_context_tokens
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(f"max_model_len {config.max_model_len} is more than the model's context of {limit} tokens")
    return config.max_model_len or limit


def _layout(
    config: EngineConfig, checkpoint: Checkpoint, shape: ParallelShape, dtype: torch.dtype, long_factors: bool
) -> KvLayout:
    """The layout of the instance's KV: as many blocks as fit into `kv_memory_bytes`, divided over all ranks."""
    spec = checkpoint.spec
    block_bytes = spec.kv_bytes_per_token(dtype.itemsize) * config.block_size
    num_blocks = config.kv_memory_bytes // block_bytes
    if num_blocks < 1:
        raise ConfigError(f"kv_memory of {config.kv_memory_bytes} bytes holds no block of {block_bytes} bytes")
    stages = (shard_of(spec, shape, stage * shape.tp).layers for stage in range(shape.pp))
    return KvLayout(
        num_layers=spec.num_layers,
        num_blocks=num_blocks,
        num_kv_heads=spec.num_kv_heads,
        block_size=config.block_size,
        head_dim=spec.head_dim,
        dtype=str(dtype).removeprefix("torch."),
        weights_hash=checkpoint.weights_hash,
        rope_factors="long" if long_factors else "",
        tp=shape.tp,
        layers_per_stage=tuple(map(len, stages)) if shape.pp > 1 else (),
    )
