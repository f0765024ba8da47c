"""Pods of instances: how one is made, and what its fields mean. Nothing here asks Kubernetes.

Each instance is a pod of its own, made from the template of its group, which the chart writes. The pod has the settings
of its process as an annotation, as all pods of the chart do, and what the next controller must know of the process.
"""

import copy
import json
import secrets
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from tandem.core.config import WorkerConfig
from tandem.core.errors import ConfigError
from tandem.core.frozen_model import FrozenModel
from tandem.core.instance_section import RoleName
from tandem.core.other_versions import read_known
from tandem.deploy.running_process import ProcessEnd
from tandem.deploy.topology import ProcessRole, ProcessSpec

Document = dict[str, Any]
"""An object of Kubernetes, as its JSON value."""

CLUSTER = "tandem.serve/cluster"
PROCESS = "tandem.serve/process"
SETTINGS = "tandem.serve/settings"
_SPEC = "tandem.serve/spec"
_PORT_NAME = "worker"


class PodGroup(FrozenModel):
    """Pods of one kind, as the chart's workers.groups. `template` is a PodTemplateSpec with one container.
    `starts_first`: there is room for a pod beside the one that it replaces."""

    name: str
    role: RoleName
    gpu_resource: str
    starts_first: bool
    threads: int = Field(ge=1, description="Of an instance whose settings name none")
    template: Document


class PodSettings(FrozenModel):
    """What the chart tells the controller, besides the settings of the cluster. `cluster` is the value of the label
    `tandem.serve/cluster` of all its pods; `config_map` keeps what should run; the end of `deployment` is the end of
    the pods. `routers`: the name under which instances find the routers. Pods of another `plan_epoch` are replaced.
    """

    cluster: str
    config_map: str
    deployment: str
    routers: tuple[str, ...]
    plan_epoch: str
    groups: tuple[PodGroup, ...] = Field(min_length=1)

    def group_of(self, spec: ProcessSpec) -> PodGroup:
        """The group that the settings name; else the one with the name of the role, of the role, or the first. Raises
        ConfigError for a group that is not there."""
        assert isinstance(spec.config, WorkerConfig), "routers are a Deployment of the chart"
        if (wanted := spec.config.instance.pod_group) is not None:
            found = next((group for group in self.groups if group.name == wanted), None)
            if found is None:
                names = ", ".join(group.name for group in self.groups)
                raise ConfigError(f"{spec.name} has the pod_group '{wanted}', and the chart has the groups {names}")
            return found
        role = spec.role.value
        same = [group for group in self.groups if group.name == role]
        same += [group for group in self.groups if group.role == role]
        return (same or list(self.groups))[0]


def make_pod(spec: ProcessSpec, settings: PodSettings, token: str | None, owner: Document) -> Document:
    """A pod with a name of its own. `token` is where it finds the cluster token; `owner` refers to the Deployment.
    Raises ConfigError as `group_of`."""
    group = settings.group_of(spec)
    assert isinstance(spec.config, WorkerConfig), "group_of has seen to it"
    engine = spec.config.instance.engine
    if spec.shares_cores:
        engine = engine.model_copy(update={"threads": group.threads})
    config = spec.config.model_copy(
        update={
            "cluster_token": token,
            "routers": settings.routers,
            "plan_epoch": settings.plan_epoch,
            "instance": spec.config.instance.model_copy(update={"engine": engine}),
        }
    )
    described = {
        "role": spec.role.value,
        "index": spec.index,
        "entry": spec.entry,
        "threads": spec.threads,
        "gpus": spec.gpus,
        "shares_cores": spec.shares_cores,
    }
    pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(group.template)}
    metadata, container = pod["metadata"], pod["spec"]["containers"][0]
    metadata["name"] = f"{settings.cluster}-{spec.name}-{secrets.token_hex(4)}"
    metadata["ownerReferences"] = [owner]
    metadata.setdefault("labels", {}).update({CLUSTER: settings.cluster, PROCESS: spec.name})
    annotations = {SETTINGS: json.dumps(config.model_dump(mode="json")), _SPEC: json.dumps(described)}
    metadata.setdefault("annotations", {}).update(annotations)
    pod["spec"]["restartPolicy"] = "Never"  # an instance is replaced as a whole, by another pod
    container["terminationMessagePolicy"] = "FallbackToLogsOnError"  # the reason of its end, for `end_of`
    limits = container.setdefault("resources", {}).setdefault("limits", {})
    limits.pop(group.gpu_resource, None)
    if spec.gpus:
        limits[group.gpu_resource] = int(spec.gpus)
    return pod


def owner_of(deployment: Document) -> Document:
    """Kubernetes' garbage collector deletes pods whose owner is gone. The owner does not manage them: its number of
    replicas is none of theirs."""
    metadata = deployment["metadata"]
    return {"apiVersion": "apps/v1", "kind": "Deployment", "name": metadata["name"], "uid": metadata["uid"]}


def spec_of(pod: Document, settings: PodSettings, token: str | None) -> ProcessSpec:
    """The process of a pod, as `make_pod` got it. One of another plan epoch keeps that epoch in its settings, so it is
    unlike the process that should run, and the controller replaces it. Raises ValueError, KeyError or TypeError for a
    pod that this version cannot read."""
    annotations = pod["metadata"]["annotations"]
    config, described = read_known(WorkerConfig, json.loads(annotations[SETTINGS])), json.loads(annotations[_SPEC])
    epoch = None if config.plan_epoch == settings.plan_epoch else config.plan_epoch
    config = config.model_copy(update={"cluster_token": token, "plan_epoch": epoch})
    return ProcessSpec(
        ProcessRole(described["role"]),
        described["index"],
        described["entry"],
        config,
        described["threads"],
        described["gpus"],
        described["shares_cores"],
    )


def address_of(pod: Document) -> str:
    """Of the instance in a pod that is ready."""
    ports = pod["spec"]["containers"][0]["ports"]
    port = next(each["containerPort"] for each in ports if each["name"] == _PORT_NAME)
    ip = pod["status"]["podIP"]
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def is_ready(pod: Document) -> bool:
    return _condition(pod, "Ready").get("status") == "True"


def is_leaving(pod: Document) -> bool:
    """Somebody has deleted it; its requests may finish."""
    return "deletionTimestamp" in pod["metadata"]


def end_of(pod: Document) -> ProcessEnd | None:
    """None as long as the pod's container may still run."""
    status = pod.get("status", {})
    if status.get("phase") not in ("Succeeded", "Failed"):
        return None
    ended = [
        (each["name"], each["state"]["terminated"])
        for each in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ()))
        if each.get("state", {}).get("terminated", {}).get("exitCode")
    ]
    reason = f"its pod {pod['metadata']['name']} has ended"
    if status.get("reason"):  # such as Evicted
        reason += f" ({status['reason']}: {status.get('message', 'no reason given')})"
    for name, state in ended:
        reason += f"; {name} ended with status {state['exitCode']} ({state.get('reason', 'no reason given')})"
        if state.get("message"):
            reason += f": {_last_line(state['message'])}"
    return ProcessEnd(reason, was_asked=is_leaving(pod) or status["phase"] == "Succeeded")


def reason_of_wait(pod: Document) -> str:
    """Why a pod is not ready, in words."""
    scheduled = _condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        return f"no node takes its pod: {scheduled.get('message', scheduled.get('reason', 'no reason given'))}"
    status = pod.get("status", {})
    for each in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        waiting: Mapping[str, str] = each.get("state", {}).get("waiting", {})
        if waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
            message = f": {waiting['message']}" if waiting.get("message") else ""
            return f"its container {each['name']} waits ({waiting['reason']}{message})"
    if ready := _condition(pod, "Ready").get("message"):
        return f"it is not ready: {ready}"
    return "it is still loading"


def _condition(pod: Document, kind: str) -> Mapping[str, str]:
    conditions = pod.get("status", {}).get("conditions", ())
    return next((each for each in conditions if each["type"] == kind), {})


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
