"""Instance kinds: a role, a device type and a parallel shape that memory and the model allow."""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tandem.core.cost_model import CostModel, StepLoad
from tandem.core.instance_section import RoleName
from tandem.core.model_shape import ModelShape
from tandem.core.parallel import ParallelShape
from tandem.core.slo_file import SearchSection
from tandem.placement.costs.calibration import Calibration
from tandem.placement.costs.cost_source import MAX_BATCH, CostSource
from tandem.placement.workload.requests import RequestStream
from tandem.scheduling.budget import Mixing

_PREFILL_BUDGETS = (512, 1024, 2048, 4096, 8192)
_CHUNK_BUDGETS = (256, 512, 1024, 2048)
BUDGET_FACTORS = (0.75, 1.5)
"""Between two of the budgets, and beyond the largest; see `variants`."""
_PROMPT_FIRST_BUDGET = 4096
_SLACK_BUDGET = 512  # at least, of a step where there is slack for so many prompt tokens
_SATURATED = 0.9  # share of the best budget's tokens per second


@dataclass(frozen=True, slots=True)
class InstanceKind:
    """An instance without assigned devices. The other fields determine the cost model, so equality ignores it.

    `kv_tokens`, `max_batch_tokens`, `max_batch` and `policy` as in `core.plan.PlanGroup`.
    """

    role: RoleName
    device: str
    shape: ParallelShape
    kv_tokens: int
    max_batch_tokens: int
    max_batch: int
    policy: Mixing = "chunked"
    cost: CostModel = field(compare=False, repr=False, kw_only=True)

    @property
    def num_devices(self) -> int:
        return self.shape.num_ranks

    def __str__(self) -> str:
        extra = ""
        if self.role == "colocated":
            extra = f" {self.policy} {self.max_batch_tokens}"
        return f"{self.role} {self.shape}{extra}"


@dataclass(frozen=True, slots=True)
class RejectedShape:
    """A shape that cannot serve this workload on this device, or in one role not as well as a smaller one, with the
    reason. `role` None: in no role."""

    device: str
    shape: ParallelShape
    reason: str
    role: RoleName | None = None

    def __str__(self) -> str:
        return f"{self.shape} on {self.device}" if self.role is None else f"{self.role} {self.shape} on {self.device}"


@dataclass(frozen=True, slots=True)
class Kinds:
    """`slower` are shapes that `slower_shapes` left out, `rejected` those that cannot serve at all."""

    prefill: tuple[InstanceKind, ...]
    decode: tuple[InstanceKind, ...]
    colocated: tuple[InstanceKind, ...]
    rejected: tuple[RejectedShape, ...]
    slower: tuple[RejectedShape, ...] = ()


def legal_shapes(model: ModelShape, section: SearchSection, devices_per_node: int) -> Iterator[ParallelShape]:
    """Shapes with tp inside a node, pp that divides the layers and heads that divide over tp; small shapes first, those
    with dp last."""
    for pp in range(1, section.max_pp + 1):
        for tp in range(1, min(section.max_tp, devices_per_node) + 1):
            shape = ParallelShape(tp, pp)
            if model.num_layers % pp == 0 and model.allows(shape):
                yield shape
    for dp in range(2, min(section.max_dp, devices_per_node) + 1):
        if model.allows(ParallelShape(dp=dp)):
            yield ParallelShape(dp=dp)


def legal_kinds(
    model: ModelShape,
    source: CostSource,
    nodes: Sequence[tuple[str, int, int]],
    section: SearchSection,
    stream: RequestStream,
    *,
    one_rank: Container[str] = (),
) -> Kinds:
    """All instance kinds on `nodes` (device type, devices in a node, nodes). They do not depend on the targets. On the
    devices `one_rank` nobody knows what several ranks take.

    A shape is legal if the weights fit and its KV memory holds the longest request of the stream. Colocated instances
    have several budgets of prompt tokens per step: small budgets keep TPOT low, large budgets raise throughput.
    """
    roles: dict[RoleName, list[InstanceKind]] = {"prefill": [], "decode": [], "colocated": []}
    rejected: list[RejectedShape] = []
    widest: dict[str, int] = {}
    total: dict[str, int] = {}
    for device, devices_per_node, count in nodes:
        widest[device] = max(widest.get(device, 0), devices_per_node)
        total[device] = total.get(device, 0) + devices_per_node * count
    longest = int((stream.prompt_tokens + stream.output_tokens).max())
    for device, devices_per_node in widest.items():
        for shape in legal_shapes(model, section, devices_per_node):
            if shape.num_ranks > total[device]:
                continue
            cost, kv_tokens = source.cost_model(device, shape), source.kv_tokens(device, shape)
            if device in one_rank and shape.num_ranks > 1:
                reason = "what several ranks take on a CPU is known only where tandem profile measured it"
                rejected.append(RejectedShape(device, shape, reason))
            elif cost is None:
                rejected.append(RejectedShape(device, shape, "its step times are unknown"))
            elif kv_tokens == 0:
                rejected.append(RejectedShape(device, shape, "the weights do not fit its memory"))
            elif kv_tokens < longest:
                reason = f"its memory holds KV of {kv_tokens:,} tokens; the longest request has {longest:,} tokens"
                rejected.append(RejectedShape(device, shape, reason))
            else:
                for kind in _kinds_of_shape(device, shape, cost, kv_tokens, stream):
                    roles[kind.role].append(kind)
    return Kinds(tuple(roles["prefill"]), tuple(roles["decode"]), tuple(roles["colocated"]), tuple(rejected))


def with_slack(kind: InstanceKind, calibrations: Mapping[str, Calibration]) -> InstanceKind:
    """The policy `slack` for a colocated kind with chunks, where the step times of its shape are calibrated for its
    device. Other kinds stay as they are."""
    if kind.role != "colocated" or kind.policy != "chunked":
        return kind
    calibration = calibrations.get(kind.device)
    if calibration is None or calibration.engine_cost(kind.shape) is None:
        return kind
    return replace(kind, policy="slack", max_batch_tokens=max(kind.max_batch_tokens, _SLACK_BUDGET))


def with_budget(kind: InstanceKind, factor: float) -> InstanceKind:
    """Another budget of prompt tokens per step, for a colocated kind with chunks. Other kinds stay as they are."""
    if kind.role != "colocated" or kind.policy != "chunked":
        return kind
    budget = int(factor * kind.max_batch_tokens)
    return replace(kind, max_batch_tokens=budget, max_batch=min(kind.max_batch, budget))


def resident_tokens(stream: RequestStream) -> float:
    """Mean KV tokens of a decoding sequence over its decode steps."""
    steps = stream.output_tokens - 1
    if not steps.any():
        return float(stream.prompt_tokens.mean())
    return float((steps * (stream.prompt_tokens + stream.output_tokens / 2)).sum() / steps.sum())


def phase_kind(
    role: RoleName, device: str, shape: ParallelShape, cost: CostModel, kv_tokens: int, stream: RequestStream
) -> InstanceKind:
    """A prefill or decode instance with batch sizes for the stream."""
    max_batch = max(1, min(MAX_BATCH, int(kv_tokens / resident_tokens(stream))))
    return InstanceKind(role, device, shape, kv_tokens, saturating_budget(cost, stream), max_batch, cost=cost)


def _kinds_of_shape(
    device: str, shape: ParallelShape, cost: CostModel, kv_tokens: int, stream: RequestStream
) -> Iterator[InstanceKind]:
    prefill = phase_kind("prefill", device, shape, cost, kv_tokens, stream)
    max_batch = prefill.max_batch
    yield prefill
    yield replace(prefill, role="decode")
    for budget in _CHUNK_BUDGETS:
        batch = min(max_batch, budget)
        yield InstanceKind("colocated", device, shape, kv_tokens, budget, batch, "chunked", cost=cost)
    yield InstanceKind(
        "colocated", device, shape, kv_tokens, _PROMPT_FIRST_BUDGET, max_batch, "prompt_first", cost=cost
    )


def saturating_budget(cost: CostModel, stream: RequestStream) -> int:
    """The smallest budget of prompt tokens per step that nearly saturates the device (DistServe's L_m). A larger budget
    only delays the first prompts of a step."""
    mean = max(1, int(stream.prompt_tokens.mean()))
    tokens_per_s = {}
    for budget in _PREFILL_BUDGETS:
        lengths = (mean,) * max(1, budget // mean) if mean <= budget else (budget,)
        tokens_per_s[budget] = sum(lengths) / cost.step(StepLoad.of_prompts(*lengths)).interval_s
    best = max(tokens_per_s.values())
    return min(budget for budget in _PREFILL_BUDGETS if tokens_per_s[budget] >= _SATURATED * best)
