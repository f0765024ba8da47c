"""The router that serves a plan."""

from tandem.core.plan import Plan
from tandem.core.router_section import RouterSection

_FULL = 2  # the requests that all instances decode at once, times this: as many wait


def planned_router(plan: Plan) -> RouterSection:
    """The settings of the router with which `tandem serve` runs the plan, and with which it is simulated: the plan's
    classes, and no limit of requests that a cluster of this size would meet; the defaults otherwise. Only what differs
    from these is set."""
    num_decoding = sum(group.instances * group.max_batch for group in plan.groups if group.role != "prefill")
    settings: dict[str, object] = {}
    if plan.slo:
        settings["slo"] = plan.slo
    if _FULL * num_decoding > RouterSection().max_queue:
        settings["max_queue"] = _FULL * num_decoding
    return RouterSection.model_validate(settings)
