"""The state of the cluster as the page /ui reads it: bounded JSON, most of it computed once a second at most."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import orjson

from tandem.core.clock import Clock
from tandem.core.errors import NotFoundError
from tandem.core.plan import ExpectedClass, Plan
from tandem.core.replanning import ReplanStatus
from tandem.core.session import BLOCK_OWNERS, Role
from tandem.core.slo import SloClass
from tandem.router.dispatch import Dispatcher
from tandem.router.records import RequestLog
from tandem.router.ui.recent_requests import MAX_RECORDS, latest_fields, summarize
from tandem.scheduling.known_instance import KnownInstance

_KEPT_S = 1.0
_MAX_INSTANCES = 200
_NUM_LATEST = 30
_MAX_SEARCHED = 2048  # of the last requests, for those of a tenant


class ClusterView:
    """Reads the router's state and changes nothing. Used on the router's event loop only.

    `plan` gives what the cluster is made from, None where it is not known; `replan` gives the last report of the watch
    over the plan.
    """

    def __init__(
        self,
        *,
        model: str,
        dispatcher: Dispatcher,
        log: RequestLog,
        classes: Iterable[SloClass],
        plan: Callable[[], Plan | None],
        replan: Callable[[], ReplanStatus | None],
        clock: Clock,
    ) -> None:
        self._model = model
        self._dispatcher = dispatcher
        self._log = log
        self._classes = tuple(classes)
        self._plan = plan
        self._replan = replan
        self._clock = clock
        self._started_s = clock.now_s()
        self._computed_s = float("-inf")
        self._state = b""

    def state(self) -> bytes:
        """Everything but single requests, as one JSON object, at most `_KEPT_S` old."""
        now_s = self._clock.now_s()
        if now_s - self._computed_s >= _KEPT_S:
            self._state = orjson.dumps(self._fields(now_s))
            self._computed_s = now_s
        return self._state

    def latest(self, tenant: str | None) -> bytes:
        """A JSON list of the last requests, newest first; of one tenant, or None: of all."""
        now_s = self._clock.now_s()
        records = self._log.latest(_MAX_SEARCHED)
        own = (record for record in records if tenant is None or record.tenant == tenant)
        return orjson.dumps([latest_fields(record, now_s) for record in islice(own, _NUM_LATEST)])

    def explain(self, request_id: str, tenant: str | None) -> bytes:
        """A JSON object with the text of `tandem explain`. Raises NotFoundError for an unknown request, or one of
        another tenant than `tenant`."""
        record = self._log.find(request_id)
        if record is None or (tenant is not None and record.tenant != tenant):
            raise NotFoundError("This router does not remember a finished request of that id.")
        return orjson.dumps({"request_id": request_id, "text": self._log.explain(request_id)})

    def _fields(self, now_s: float) -> dict[str, Any]:
        dispatcher = self._dispatcher
        instances = dispatcher.fleet.instances
        plan, replan = self._plan(), self._replan()
        return {
            "model": self._model,
            "uptime_s": now_s - self._started_s,
            "running": dispatcher.running_requests,
            "queued": dispatcher.queued_requests,
            "held": dispatcher.machine.num_held,
            "expected_wait_s": dispatcher.expected_wait_s,
            "early_refusals": dict(self._log.early_refusals),
            "roles": [_role_fields(role, instances) for role in Role],
            "instances": [_instance_fields(instance) for instance in _most_important(instances)],
            "classes": [_class_fields(slo) for slo in self._classes],
            "recent": summarize(self._log.latest(MAX_RECORDS), self._classes, self._started_s, now_s),
            "plan": None if plan is None else _plan_fields(plan),
            "replan": None if replan is None else _replan_fields(replan),
        }


def _most_important(instances: tuple[KnownInstance, ...]) -> list[KnownInstance]:
    """By role and id. Of more than `_MAX_INSTANCES`, those that take no work and then the busiest."""
    if len(instances) > _MAX_INSTANCES:
        ranked = sorted(instances, key=lambda instance: (instance.is_usable, -instance.open_requests))
        instances = tuple(ranked[:_MAX_INSTANCES])
    return sorted(instances, key=lambda instance: (instance.role.value, instance.instance_id))


def _role_fields(role: Role, instances: tuple[KnownInstance, ...]) -> dict[str, Any]:
    own = [instance for instance in instances if instance.role is role]
    return {
        "role": role.value,
        "instances": len(own),
        "usable": sum(instance.is_usable for instance in own),
        "blocks": {owner: sum(getattr(each.status.blocks, owner) for each in own) for owner in BLOCK_OWNERS},
    }


def _instance_fields(instance: KnownInstance) -> dict[str, Any]:
    status = instance.status
    return {
        "id": instance.instance_id,
        "role": instance.role.value,
        "state": status.state.value,
        "is_usable": instance.is_usable,
        "open": instance.open_requests,
        "waiting": status.waiting_requests,
        "running": status.running_requests,
        "waiting_tokens": status.uncomputed_tokens + status.unreserved_tokens,
        "blocks": {owner: getattr(status.blocks, owner) for owner in BLOCK_OWNERS},
        "block_tokens": status.block_size,
        "steps": status.steps,
        "step_s": status.step_s,
        "step_age_s": status.step_age_s,
        "computed_tokens": status.computed_tokens,
        "preemptions": status.preemptions,
        "failed_transfers": sum(link.failures for link in status.links),
    }


def _class_fields(slo: SloClass) -> dict[str, Any]:
    return {"name": slo.name, "ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "attainment": slo.attainment}


def _plan_fields(plan: Plan) -> dict[str, Any]:
    expected = plan.expected
    groups = [
        {
            "role": group.role,
            "instances": group.instances,
            "device": group.device,
            "shape": str(group.shape),
            "devices": group.num_devices,
        }
        for group in plan.groups
    ]
    fields: dict[str, Any] = {"summary": plan.summary, "verdict": plan.verdict, "groups": groups, "expected": None}
    if expected is not None:
        fields["expected"] = {
            "rate": expected.rate,
            "goodput": expected.goodput,
            "goodput_ci": expected.goodput_ci,
            "classes": [_expected_fields(each) for each in expected.classes],
        }
    return fields


def _expected_fields(expected: ExpectedClass) -> dict[str, Any]:
    return _class_fields(expected.slo) | {
        "expected_attainment": expected.attainment,
        "expected_ttft_s": expected.ttft_s.model_dump(),
        "expected_tpot_s": expected.tpot_s.model_dump(),
    }


def _replan_fields(replan: ReplanStatus) -> dict[str, Any]:
    proposal = replan.proposal
    return {
        "state": replan.state.value,
        "note": replan.note,
        "changes": [
            {"name": each.name, "planned": each.planned, "live": each.live, "strength": each.strength}
            for each in replan.changes
        ],
        "proposal": None
        if proposal is None
        else {"summary": proposal.summary, "gain": proposal.gain, "changes": proposal.changes},
    }
