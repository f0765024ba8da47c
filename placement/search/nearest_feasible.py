"""The nearest feasible targets for a problem without solution."""

from dataclasses import replace

import numpy as np

from tandem.core.cost_model import StepLoad
from tandem.core.slo import SloClass
from tandem.placement.search.kinds import InstanceKind, legal_kinds, resident_tokens
from tandem.placement.search.problem import Problem

HEADROOMS = (1.25, 2.0, 4.0, 8.0, 16.0)
"""Ratios to the latencies of an idle cluster, so that some load is possible: the next one if no deployment is found."""


def nearest_feasible(problem: Problem, headroom: float) -> Problem | None:
    """The problem with each target raised at least to `headroom` times the latency of the fastest shape.

    None if no shape fits the memory, or if no target needs to be raised.
    """
    nodes = [(node.device, node.devices, node.count) for node in problem.node_types]
    kinds = legal_kinds(
        problem.model, problem.source, nodes, problem.section, problem.requests, one_rank=problem.one_rank_devices
    )
    if not kinds.decode:
        return None
    classes = tuple(
        _feasible(problem, slo, index, kinds.prefill, kinds.decode, headroom)
        for index, slo in enumerate(problem.classes)
    )
    return None if classes == problem.classes else replace(problem, classes=classes, rate=None)


def _feasible(
    problem: Problem,
    slo: SloClass,
    index: int,
    prefill: tuple[InstanceKind, ...],
    decode: tuple[InstanceKind, ...],
    headroom: float,
) -> SloClass:
    lengths = problem.computed.prompt_tokens[problem.computed.slo_class == index]
    longest = int(np.quantile(lengths, slo.attainment, method="higher")) if len(lengths) else 1
    ttft_s = min(kind.cost.step(StepLoad.of_prompts(longest)).total_s for kind in prefill) * headroom
    load = StepLoad.of_decode(1, round(resident_tokens(problem.computed)))
    tpot_s = min(kind.cost.step(load).total_s for kind in decode) * headroom
    return slo.model_copy(update={"ttft_s": max(slo.ttft_s, ttft_s), "tpot_s": max(slo.tpot_s, tpot_s)})
