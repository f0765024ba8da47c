"""The engine: token ids in, token ids out. One model on one device, over one pool of KV blocks."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tandem.core.errors import ConfigError, InternalError
from tandem.core.kv_layout import KvLayout
from tandem.core.model_spec import ModelSpec
from tandem.core.request import SamplingParams, TokenLogprob
from tandem.engine.batching import decodes_first, num_wanted_rows, pack
from tandem.engine.checkpoint import Checkpoint, open_checkpoint
from tandem.engine.config import Capacity, EngineConfig
from tandem.engine.device import choose_device, choose_dtype, choose_threads
from tandem.engine.models.base import Model
from tandem.engine.models.load import load_model
from tandem.engine.ops.choose import choose_ops
from tandem.engine.sampler import logprobs, not_a_number, sample
from tandem.engine.step import SampleRequest, SequenceSlice, StepOutput

# Logits of a long prompt are computed in parts of at most so many numbers.
_MAX_LOGITS = 1 << 24


class Engine:
    """Computes steps. Whoever calls it owns the blocks and decides what a step holds; the engine keeps no sequences.

    `pool` is the KV pool as a tensor of `layout.shape`; `ops_name` says what computes. Not thread-safe: one thread
    calls `step`.
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

    def capacity(self) -> Capacity:
        held_tokens = self.layout.num_blocks * self.layout.block_size
        return Capacity(self.layout.num_blocks, self.layout.block_size, min(self._max_model_len, held_tokens))

    @torch.inference_mode()
    def step(self, slices: Sequence[SequenceSlice]) -> StepOutput:
        """Compute all slices together: chunks of prompts and single tokens in any mixture, packed without padding.

        The caller guarantees token ids below `spec.vocab_size`, positions below `capacity().max_model_len`, and that
        no two slices write the same block.
        """
        assert slices, "a step computes something"
        assert all(part.token_ids for part in slices), "a slice has at least one token"
        assert all(part.start + len(part.token_ids) <= self._max_model_len for part in slices), "beyond the context"
        order = decodes_first(slices)
        ordered = [slices[index] for index in order]
        batch = pack(ordered, self.layout, self.spec.vocab_size, self.pool.device)
        hidden = self._model.forward(batch, self.pool)

        output = StepOutput([None] * len(slices), [None] * len(slices), [None] * len(slices))
        drawn: list[tuple[int, int, SampleRequest]] = []  # slice, row of its last token, request
        end = 0
        for index, part in zip(order, ordered, strict=True):
            begin, end = end, end + num_wanted_rows(part)
            if part.prompt_logprobs is not None:
                entries = self._prompt_logprobs(hidden[begin:end], part)
                if any(math.isnan(entry.logprob) for entry in entries):
                    output.errors[index] = not_a_number()
                else:
                    output.prompt_logprobs[index] = entries
            if part.sample is not None:
                drawn.append((index, end - 1, part.sample))
        if drawn:
            last = hidden if len(drawn) == len(hidden) else hidden[[row for _, row, _ in drawn]]
            results = sample(self._model.logits(last), [request for _, _, request in drawn])
            for (index, _, _), result in zip(drawn, results, strict=True):
                if isinstance(result, InternalError):
                    output.errors[index] = result
                elif output.errors[index] is None:
                    output.tokens[index] = result
        return output

    def warm_up(self) -> None:
        """Run one small prompt and one decode step, so that the first request does not pay for first touches.

        Overwrites block 0; call it before any sequence lives in the pool.
        """
        request = SampleRequest(SamplingParams(temperature=0.0), position=1, history=(), num_prompt_tokens=1)
        length = min(self.layout.block_size, self._max_model_len) - 1
        if length > 0:
            self.step([SequenceSlice([0] * length, 0, [0], request)])
        self.step([SequenceSlice([0], length, [0], request)])
        self.pool[:, :, 0].zero_()

    def close(self) -> None:
        """Let go of weights and pool. Nothing may be called afterwards."""
        del self._model, self.pool

    def _prompt_logprobs(self, hidden: Tensor, part: SequenceSlice) -> list[TokenLogprob]:
        assert part.prompt_logprobs is not None
        following = list(part.token_ids[1:])
        if part.next_token_id is not None:
            following.append(part.next_token_id)
        rows_at_once = max(1, _MAX_LOGITS // self.spec.vocab_size)
        entries: list[TokenLogprob] = []
        for begin in range(0, len(following), rows_at_once):
            token_ids = following[begin : begin + rows_at_once]
            logits = self._model.logits(hidden[begin : begin + len(token_ids)])
            entries += logprobs(logits, token_ids, [part.prompt_logprobs] * len(token_ids))
        return entries


def load_engine(config: EngineConfig, allocate_pool: Callable[[int], Tensor] | None = None) -> Engine:
    """Load a checkpoint and make its KV pool. Raises CheckpointError or ConfigError with a sentence for a person.

    `allocate_pool(pool_bytes)` returns the uint8 tensor that is to hold the KV pool, on the engine's device; None
    takes ordinary memory. Sets the process's number of torch threads.
    """
    checkpoint = open_checkpoint(config.model_path)
    spec = checkpoint.spec
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, spec, device)
    max_model_len = _max_model_len(config, spec)
    layout = _layout(config, checkpoint, dtype)
    num_threads = choose_threads(config.num_threads)
    torch.set_num_threads(num_threads)
    ops = choose_ops(config.ops, dtype, device, head_dim=spec.head_dim, num_threads=num_threads)
    with torch.inference_mode():
        model = load_model(checkpoint, ops, dtype, device, max_model_len)
    # Outside inference mode: others write into the pool too.
    if allocate_pool is None:
        pool = torch.zeros(layout.shape, dtype=dtype, device=device)
    else:
        pool = allocate_pool(layout.pool_bytes).view(dtype).view(layout.shape)
    return Engine(spec, layout, pool, model, max_model_len, ops.name)


def _max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    limit = spec.max_context_tokens
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(f"max_model_len {config.max_model_len} is more than the model's context of {limit} tokens")
    return config.max_model_len or limit


def _layout(config: EngineConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> KvLayout:
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
    )
