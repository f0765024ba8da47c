"""What bounds the steps of a set of instances in a run."""

from collections.abc import Sequence

from tandem.placement.evidence import PhaseBound
from tandem.placement.simulator.result import InstanceUse


def phase_bound(role: str, label: str, uses: Sequence[InstanceUse], tokens: int, end_s: float) -> PhaseBound:
    """The sum over `uses` of instances of one role. `tokens`: of all their steps, for the mean per step."""
    terms: dict[str, float] = {}
    for use in uses:
        for name, time_s in use.cost_terms_s.items():
            terms[name] = terms.get(name, 0.0) + time_s
    return PhaseBound(
        role=role,
        label=label,
        cost_terms_s=tuple(terms.items()),
        utilisation=min(1.0, sum(use.busy_s for use in uses) / (len(uses) * end_s)) if end_s > 0 else 0.0,
        kv_peak=max((use.peak_blocks / max(1, use.num_blocks) for use in uses), default=0.0),
        tokens_per_step=tokens / max(1, sum(use.steps for use in uses)),
    )
