"""The roofline cost of a step of one model on one device in one parallel shape."""

from tandem.core.cost_model import StepCost, StepLoad
from tandem.core.model_shape import MlaShape, ModelShape, MoeShape
from tandem.core.parallel import ParallelShape
from tandem.placement.costs.efficiency import Efficiency, EngineOverhead, ExpertsEfficiency
from tandem.placement.costs.hardware import Device
from tandem.placement.costs.operators import (
    all_reduce_s,
    decode_attention_coefficients,
    elementwise_s,
    experts_s,
    gemm_fp8_s,
    gemm_s,
    mixed_attention_s,
    prefill_attention_s,
    send_s,
)

_ACTIVATION_BYTES = 2.0
_SAMPLER_BYTES = 10.0  # per sequence and logit: two to three passes over float32 logits


def elementwise_bytes(model: ModelShape, tp: int, tokens: float) -> float:
    """Bytes that one layer's norms, rotation, activation and residuals move: each reads its input, writes its
    output."""
    inner = model.intermediate_size if model.moe is None else model.moe.top_k * model.moe.intermediate_size
    heads = model.num_heads + max(tp, model.num_kv_heads)
    return _ACTIVATION_BYTES * tokens * (8 * model.hidden_size + (2 * model.head_dim * heads + 3 * inner) / tp)


def mixture_s(
    model: ModelShape, moe: MoeShape, shape: ParallelShape, tokens: float, device: Device, fit: ExpertsEfficiency
) -> float:
    """Seconds of one layer's routed experts on one rank, which computes all of `tokens` tokens' visits or, with dp, its
    part of those of `tokens` tokens on each rank; `device` has the peak of its products. Tokens are assumed to pick
    experts independently and uniformly; skewed routing uses fewer experts and waits for the one with the most
    tokens."""
    weights = model.mlp_weights(moe.intermediate_size) / shape.tp
    unused = (1.0 - moe.top_k / moe.num_experts) ** (tokens * shape.dp)
    touched = moe.num_experts / shape.dp * (1.0 - unused)
    visits = moe.top_k * tokens
    num_bytes = model.weight_bytes * touched * weights + 2.0 * _ACTIVATION_BYTES * visits * model.hidden_size
    return experts_s(visits, touched, weights, num_bytes, device, fit)


class RooflineCost:
    """A `core.cost_model.CostModel`.

    With pp > 1, a step with decoding sequences is a round of up to pp micro-batches, each on a different stage at a
    time: the step takes pp times the fullest stage's time for one micro-batch. A step of prompts passes the stages one
    after the other and frees the first stage for the next step.

    With dp > 1 sequences and prompts are spread evenly over the ranks. Around its experts a layer collects the tokens
    of all ranks and sums their results (all-gather and reduce-scatter, together an all-reduce), as vLLM does by
    default.

    Terms that depend only on a number of tokens or sequences are cached by that number.
    """

    __slots__ = (
        "_by_sampled",
        "_by_sequences",
        "_by_tokens",
        "_decode_coefficients",
        "_decode_fit",
        "_device",
        "_experts_device",
        "_experts_fit",
        "_fit",
        "_gemm_fp8",
        "_heads",
        "_kv_heads",
        "_link",
        "_mixed_fit",
        "_model",
        "_node_size",
        "_overhead",
        "_shape",
        "_stage_layers",
    )

    def __init__(
        self,
        model: ModelShape,
        device: Device,
        shape: ParallelShape,
        fit: Efficiency,
        overhead: EngineOverhead,
        *,
        devices_per_node: int,
    ) -> None:
        """`shape` is legal for `model`."""
        assert model.allows(shape)
        self._model, self._device, self._shape, self._overhead = model, device, shape, overhead
        self._fit = fit = fit.slowed(overhead.slowdown, overhead.latency)
        self._link = fit.link if device.nvlink_bytes_per_s else fit.pcie
        self._gemm_fp8, self._experts_fit, self._experts_device = None, fit.experts, device
        self._decode_fit = fit.decode_attention if model.mla is None else fit.latent_decode
        if model.kv_bytes == 1.0 and model.mla is None:
            self._decode_fit = fit.decode_kv_fp8 or fit.decode_attention
        if model.weight_bytes == 1.0 and device.fp8_flops and fit.gemm_fp8 is not None:
            self._gemm_fp8 = fit.gemm_fp8
            if fit.experts_fp8 is not None:
                self._experts_fit, self._experts_device = fit.experts_fp8, device.for_fp8
        self._mixed_fit = fit.mixed_attention if model.mla is None else None  # None: two kernels
        self._node_size = devices_per_node
        self._stage_layers = -(-model.num_layers // shape.pp)
        self._heads = model.num_heads // shape.tp
        self._kv_heads = max(1, model.num_kv_heads // shape.tp)
        self._by_tokens: dict[float, tuple[float, float, float]] = {}
        self._by_sequences: dict[float, tuple[float, float]] = {}
        self._by_sampled: dict[float, float] = {}
        self._decode_coefficients: dict[int, tuple[float, float]] = {}

    def step(self, load: StepLoad) -> StepCost:
        """Computed in a few microseconds. A load without tokens costs 0."""
        if load.tokens == 0:
            return StepCost()
        sequences, pp = load.decode_sequences, self._shape.pp
        batches = min(pp, sequences) or 1
        layers = self._model.num_layers if batches == 1 else pp * self._stage_layers
        parts = batches * self._shape.dp  # one on each rank that has sequences of its own
        decode_parts = min(parts, sequences) or 1
        linear_s, collective_s, hand_off_s = self._tokens_terms(load.tokens / parts)
        attention_s = self._prefill_attention_s(load, parts) if load.prefill_tokens else 0.0
        kv_fixed_s, kv_token_s = 0.0, 0.0
        if sequences:
            kv_fixed_s, kv_token_s = self._decode_terms(sequences / decode_parts)
        launch_s = 0.0
        if load.prefill_tokens or not self._overhead.graph_decode:
            launch_s = self._overhead.eager_layer_s + (self._overhead.prompt_layer_s if load.prefill_tokens else 0.0)
            launch_s = max(0.0, launch_s - linear_s - collective_s - attention_s - kv_fixed_s)
        head_s = batches * self._head_s(load.sampled / parts)
        fixed_s = self._overhead.step_s + self._overhead.sequence_s * load.sampled / self._shape.dp
        kv_read_s = kv_fixed_s + kv_token_s * load.decode_kv_tokens / decode_parts
        if sequences and load.prefill_tokens and self._mixed_fit is not None:
            mixed_s = self._mixed_attention_s(load, parts, sequences, load.decode_kv_tokens)
            if mixed_s > 0:  # one kernel: what decoding adds to the time of the prompts
                kv_read_s = max(mixed_s, kv_read_s, attention_s) - attention_s
        layer_s = linear_s + collective_s + attention_s + kv_read_s + launch_s
        pipeline_s = (pp - 1) * hand_off_s
        if pp == 1 or sequences:
            interval_s = layers * layer_s + pipeline_s + head_s + fixed_s
        else:
            interval_s = self._stage_layers * layer_s + hand_off_s + head_s + fixed_s
        return StepCost(
            linear_s=layers * linear_s,
            attention_s=layers * attention_s,
            kv_read_s=layers * kv_read_s,
            collective_s=layers * collective_s,
            pipeline_s=pipeline_s,
            head_s=head_s,
            overhead_s=layers * launch_s + fixed_s,
            interval_s=interval_s,
        )

    def decode_coefficients(self, sequences: int) -> tuple[float, float]:
        coefficients = self._decode_coefficients.get(sequences)
        if coefficients is None:
            pp = self._shape.pp
            layers = self._model.num_layers if min(pp, sequences) == 1 else pp * self._stage_layers
            parts = min(pp * self._shape.dp, sequences)
            per_kv_token_s = layers * self._decode_terms(sequences / parts)[1] / parts
            coefficients = self.step(StepLoad.of_decode(sequences, 0)).total_s, per_kv_token_s
            self._decode_coefficients[sequences] = coefficients
        return coefficients

    # --- by number of tokens -----------------------------------------------------------------------------------------

    def _tokens_terms(self, tokens: float) -> tuple[float, float, float]:
        """Seconds of linear layers and of collectives in a layer (mean over the layers), and of one message between
        stages."""
        terms = self._by_tokens.get(tokens)
        if terms is None:
            message_bytes = _ACTIVATION_BYTES * tokens * self._model.hidden_size
            terms = (
                self._linear_s(tokens),
                self._collectives_s(message_bytes),
                self._hand_off_s(message_bytes),
            )
            self._by_tokens[tokens] = terms
        return terms

    def _collectives_s(self, message_bytes: float) -> float:
        """Mean over the layers."""
        model, dp = self._model, self._shape.dp
        if dp == 1:
            return 2.0 * self._all_reduce_s(message_bytes)
        around_experts_s = all_reduce_s(dp * message_bytes, dp, self._device, self._link)
        return model.num_moe_layers / model.num_layers * around_experts_s

    def _all_reduce_s(self, message_bytes: float) -> float:
        tp, overhead = self._shape.tp, self._overhead
        congested_bytes = max(0.0, message_bytes - overhead.free_bytes) * max(0, tp - 2) / tp
        return all_reduce_s(message_bytes, tp, self._device, self._link) + overhead.congestion_s * congested_bytes

    def _hand_off_s(self, message_bytes: float) -> float:
        if self._shape.pp == 1:
            return 0.0
        inside = self._shape.num_ranks <= self._node_size
        bandwidth = self._device.peer_bytes_per_s if inside else self._device.nic_bytes_per_s
        return send_s(message_bytes, bandwidth, self._link)

    def _linear_s(self, tokens: float) -> float:
        model = self._model
        total_s = model.num_layers * (self._projections_s(tokens) + self._elementwise_s(tokens))
        total_s += (model.num_layers - model.num_moe_layers) * self._mlp_s(tokens, model.intermediate_size)
        if model.moe is not None:
            total_s += model.num_moe_layers * self._experts_s(tokens, model.moe)
        return total_s / model.num_layers

    def _gemm_s(self, m: float, n: float, k: float) -> float:
        if self._gemm_fp8 is not None:
            return gemm_fp8_s(m, n, k, self._device, self._gemm_fp8)
        return gemm_s(m, n, k, self._model.weight_bytes, self._device, self._fit.gemm)

    def _projections_s(self, tokens: float) -> float:
        """The projections of the attention's inputs and output."""
        model, hidden, heads = self._model, self._model.hidden_size, self._heads
        if (mla := model.mla) is None:
            width = model.head_dim * (heads + 2 * self._kv_heads)
            return self._gemm_s(tokens, width, hidden) + self._gemm_s(tokens, hidden, heads * model.head_dim)
        query_width = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        down_width = mla.q_lora_rank + mla.kv_lora_rank + mla.qk_rope_head_dim  # on every rank
        return (
            self._gemm_s(tokens, down_width, hidden)
            + self._gemm_s(tokens, query_width, mla.q_lora_rank or hidden)
            + self._gemm_s(tokens, heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
            + self._gemm_s(tokens, hidden, heads * mla.v_head_dim)
        )

    def _mlp_s(self, tokens: float, intermediate_size: int) -> float:
        inner, hidden = intermediate_size / self._shape.tp, self._model.hidden_size
        up_width = (2 if self._model.gated_mlp else 1) * inner
        return self._gemm_s(tokens, up_width, hidden) + self._gemm_s(tokens, hidden, inner)

    def _experts_s(self, tokens: float, moe: MoeShape) -> float:
        """Expert router, routed and shared experts; each expert is divided over all tp ranks."""
        model = self._model
        routed_s = mixture_s(model, moe, self._shape, tokens, self._experts_device, self._experts_fit)
        shared_s = self._mlp_s(tokens, moe.num_shared * moe.intermediate_size) if moe.num_shared else 0.0
        return self._gemm_s(tokens, moe.num_experts, model.hidden_size) + routed_s + shared_s

    def _elementwise_s(self, tokens: float) -> float:
        num_bytes = elementwise_bytes(self._model, self._shape.tp, tokens)
        return elementwise_s(num_bytes, self._device, self._fit.elementwise)

    # --- attention ---------------------------------------------------------------------------------------------------

    def _prefill_attention_s(self, load: StepLoad, batches: int) -> float:
        model, heads = self._model, self._heads
        key_dim, value_dim, kv_width = model.head_dim, model.head_dim, 2 * model.head_dim * self._kv_heads
        if (mla := model.mla) is not None:  # keys and values are expanded from the latent for each head
            key_dim, value_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim, mla.v_head_dim
            kv_width = heads * (key_dim + value_dim)
        moved = heads * (key_dim + value_dim) * load.prefill_tokens + kv_width * load.prefill_kv_tokens
        seconds = prefill_attention_s(
            load.prefill_pairs / batches,
            _ACTIVATION_BYTES * moved / batches,
            load.prefill_sequences / batches,
            heads,
            (key_dim + value_dim) / 2,
            self._device,
            self._fit.prefill_attention if mla is None else self._fit.latent_prefill,
        )
        if mla is not None:
            seconds += self._expansion_s(load, batches, mla)
        return seconds if self._mixed_fit is None else max(seconds, self._mixed_attention_s(load, batches, 0, 0))

    def _expansion_s(self, load: StepLoad, batches: int, mla: MlaShape) -> float:
        """Expansion of keys and values from the latents of the tokens before a chunk. The chunk's own tokens count in
        `_projections_s`."""
        before = load.prefill_kv_tokens - load.prefill_tokens
        if before <= 0:
            return 0.0
        width = self._heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        return self._gemm_s(before / batches, width, mla.kv_lora_rank)

    def _mixed_attention_s(self, load: StepLoad, batches: int, sequences: int, kv_tokens: int) -> float:
        """One kernel for the load's prompts and these decoding sequences, on a device that has one for both."""
        assert self._mixed_fit is not None
        return mixed_attention_s(
            load.prefill_pairs / batches,
            load.prefill_kv_tokens / batches,
            sequences / batches,
            kv_tokens / batches,
            self._heads,
            self._kv_heads,
            2.0 * self._model.head_dim * self._model.kv_bytes,
            self._model.head_dim,
            self._device,
            self._mixed_fit,
        )

    def _decode_terms(self, sequences: float) -> tuple[float, float]:
        """A layer's attention: fixed seconds, and seconds per KV token of the micro-batch."""
        terms = self._by_sequences.get(sequences)
        if terms is None:
            model, mla = self._model, self._model.mla
            width = 2 * model.head_dim if mla is None else 2 * mla.kv_lora_rank + mla.qk_rope_head_dim
            kv_heads = self._kv_heads if mla is None else 1
            stored = 2 * model.head_dim * kv_heads if mla is None else model.kv_elements_per_token_and_layer
            terms = decode_attention_coefficients(
                sequences,
                kv_heads,
                kv_heads if mla is None else self._heads,
                model.kv_bytes * stored,
                2.0 * self._heads * width,
                self._device,
                self._decode_fit,
            )
            self._by_sequences[sequences] = terms
        return terms

    # --- head --------------------------------------------------------------------------------------------------------

    def _head_s(self, sampled: float) -> float:
        """Logits, their gathering from all ranks, and sampling."""
        if sampled == 0:
            return 0.0
        seconds = self._by_sampled.get(sampled)
        if seconds is None:
            model, tp, vocab = self._model, self._shape.tp, self._model.vocab_size
            seconds = gemm_s(sampled, vocab / tp, model.hidden_size, model.table_bytes, self._device, self._fit.gemm)
            seconds += elementwise_s(_SAMPLER_BYTES * sampled * vocab, self._device, self._fit.elementwise)
            gathered = _ACTIVATION_BYTES * sampled * vocab / 2  # half of an all-reduce's traffic
            seconds += all_reduce_s(gathered, tp, self._device, self._link)
            self._by_sampled[sampled] = seconds
        return seconds
