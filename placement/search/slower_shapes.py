"""Shapes that are slower than a smaller one on this cluster: ranks that share cores and memory may wait for each other
longer than they save.

Several instances of the smaller shape on the same devices are then better in every way: each step is shorter, and they
compute several at a time. Only with more memory for KV on each device can the larger shape serve more.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tandem.core.cost_model import CostModel, StepLoad
from tandem.placement.search.kinds import InstanceKind, Kinds, RejectedShape, resident_tokens
from tandem.placement.workload.requests import RequestStream

_QUANTILES = (0.5, 0.1, 0.9)  # of prompt lengths
_BATCHES = (1, 4, 16, 64)
_MORE_MEMORY = 1.05  # per device


class NamedLoad(NamedTuple):
    name: str  # e.g. "a decode step"
    load: StepLoad


def without_slower_shapes(kinds: Kinds, stream: RequestStream) -> Kinds:
    """Without each kind all of whose steps, of the loads of its role, take at least as long as those of a smaller shape
    in that role on that device. Such shapes are rejected, with figures."""
    prompts, decoding = _prompt_loads(stream), _decode_loads(stream)
    colocated = _slower_kinds(kinds.colocated, prompts, decoding)
    in_no_role = {(kind.device, kind.shape): reason for kind, reason in colocated.items()}
    of_phase = _slower_kinds(kinds.prefill, prompts) | _slower_kinds(kinds.decode, decoding)
    slower = colocated | of_phase
    rejected = [RejectedShape(device, shape, reason) for (device, shape), reason in in_no_role.items()]
    rejected += [
        RejectedShape(kind.device, kind.shape, reason, role=kind.role)
        for kind, reason in of_phase.items()
        if (kind.device, kind.shape) not in in_no_role
    ]
    return Kinds(
        prefill=tuple(kind for kind in kinds.prefill if kind not in slower),
        decode=tuple(kind for kind in kinds.decode if kind not in slower),
        colocated=tuple(kind for kind in kinds.colocated if kind not in slower),
        rejected=kinds.rejected,
        slower=tuple(rejected),
    )


def typical_loads(stream: RequestStream) -> tuple[NamedLoad, NamedLoad]:
    """The median prompt, and a decode step of one sequence."""
    return _prompt_loads(stream)[0], _decode_loads(stream)[0]


def ratios_text(cost: CostModel, other: CostModel, loads: Sequence[NamedLoad]) -> str:
    """How much longer than with `other` each load takes, in words."""
    ratios = ((name, cost.step(load).total_s / other.step(load).total_s) for name, load in loads)
    return " and ".join(f"{name} takes {ratio:.2f} times as long" for name, ratio in ratios)


def _prompt_loads(stream: RequestStream) -> list[NamedLoad]:
    lengths = [max(1, int(np.quantile(stream.prompt_tokens, share))) for share in _QUANTILES]
    return [NamedLoad(f"a prompt of {length:,} tokens", StepLoad.of_prompts(length)) for length in lengths]


def _decode_loads(stream: RequestStream) -> list[NamedLoad]:
    resident = resident_tokens(stream)
    loads = [StepLoad.of_decode(batch, round(batch * resident)) for batch in _BATCHES]
    return [NamedLoad("a decode step", load) for load in loads]


def _slower_kinds(of_role: Sequence[InstanceKind], *phases: list[NamedLoad]) -> dict[InstanceKind, str]:
    """With the reason, which has the first load of each phase."""
    found: dict[InstanceKind, str] = {}
    for kind in of_role:
        better = next((other for other in of_role if _is_slower(kind, other, phases)), None)
        if better is not None:
            first = [loads[0] for loads in phases]
            found[kind] = f"slower than {better.shape} here: {ratios_text(kind.cost, better.cost, first)}"
    return found


def _is_slower(kind: InstanceKind, other: InstanceKind, phases: Sequence[list[NamedLoad]]) -> bool:
    """`other` is of a smaller shape, no step of it is longer, and on as many devices it begins as many a second."""
    if other.device != kind.device or other.num_devices >= kind.num_devices or kind.shape.dp > 1 or other.shape.dp > 1:
        return False
    if kind.kv_tokens / kind.num_devices > _MORE_MEMORY * other.kv_tokens / other.num_devices:
        return False
    for loads in phases:
        for _, load in loads:
            step, smaller = kind.cost.step(load), other.cost.step(load)
            if step.total_s < smaller.total_s:
                return False
            if step.interval_s * kind.num_devices < smaller.interval_s * other.num_devices:
                return False
    return True
