"""What to ask for instead, where a question has no answer."""

from dataclasses import replace

import numpy as np

from tandem.core.cost_model import StepLoad
from tandem.core.slo import SloClass
from tandem.placement.search.kinds import InstanceKind, legal_kinds, resident_tokens
from tandem.placement.search.problem import Problem

_HEADROOM = 1.25  # over what an idle cluster reaches: room for some load


def nearest_question(problem: Problem) -> Problem | None:
    """The same with each target raised to what the quickest shapes reach with a little load, where it is below that.

    None if no shape fits the memory, or if no target is out of reach.
    """
    nodes = [(node.device, node.devices, node.count) for node in problem.node_types]
    kinds = legal_kinds(problem.model, problem.source, nodes, problem.section, problem.requests)
    if not kinds.decode:
        return None
    classes = tuple(
        _reachable(problem, slo, index, kinds.prefill, kinds.decode) for index, slo in enumerate(problem.classes)
    )
    return None if classes == problem.classes else replace(problem, classes=classes, rate=None)


def _reachable(
    problem: Problem,
    slo: SloClass,
    index: int,
    prefill: tuple[InstanceKind, ...],
    decode: tuple[InstanceKind, ...],
) -> SloClass:
    lengths = problem.computed.prompt_tokens[problem.computed.slo_class == index]
    longest = int(np.quantile(lengths, slo.attainment, method="higher")) if len(lengths) else 1
    ttft_s = min(kind.cost.step(StepLoad.of_prompts(longest)).total_s for kind in prefill) * _HEADROOM
    load = StepLoad.of_decode(1, round(resident_tokens(problem.computed)))
    tpot_s = min(kind.cost.step(load).total_s for kind in decode) * _HEADROOM
    return slo.model_copy(update={"ttft_s": max(slo.ttft_s, ttft_s), "tpot_s": max(slo.tpot_s, tpot_s)})
