"""The Helm chart, rendered for several values and versions of Kubernetes."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from tandem.core.config import RouterConfig, ServeConfig, WorkerConfig
from tandem.core.config_file import load_config
from tandem.deploy.kubernetes.instance_pod import PodSettings
from tandem.deploy.kubernetes.values import ChartValues
from tests.deploy.kubernetes.manifests import (
    CHART,
    KUBERNETES_VERSIONS,
    NAMESPACE,
    ROOT,
    Document,
    find,
    helm,
    mistakes_of,
    pod_templates,
    render,
    try_render,
)
from tests.deploy.monitoring.promql import known_labels, uses
from tests.router.fakes import make_cluster

VALUES = {"defaults": None} | {path.name: path for path in sorted((CHART / "ci").glob("*.yaml"))}
ON_RAY, WITH_CONTROLLER = "ray-values.yaml", "controller-values.yaml"
SETTINGS = "tandem.serve/settings"


def settings_of(template: Document) -> str:
    return str(template["metadata"]["annotations"][SETTINGS])


def test_helm_finds_nothing_to_complain_about() -> None:
    ended = helm("lint", "--strict", CHART, *(part for path in VALUES.values() if path for part in ("--values", path)))
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("values", VALUES)
def test_every_document_has_the_schema_of_its_kind(values: str, version: str) -> None:
    documents = render(VALUES[values], version=version)
    assert documents
    assert [mistake for document in documents for mistake in mistakes_of(document, version)] == []
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(set(names)) == len(names)
    assert max(len(name) for _, name in names) <= 53


def test_the_schemas_are_strict() -> None:
    """Else the test above would show nothing."""
    deployment, ray, lws = (
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}},
        {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "x"}},
        {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", "metadata": {"name": "x"}},
    )
    (mistake,) = mistakes_of(deployment | {"spec": {"replica": 1, "selector": {}, "template": {}}}, "1.34")
    assert "'replica' was unexpected" in mistake
    for document in (lws, ray):
        found = mistakes_of(document | {"spec": {"replica": 1}}, "1.34")
        assert any("'replica' was unexpected" in each for each in found)


# --- values ----------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_code() -> None:
    assert ChartValues.model_validate(yaml.safe_load((CHART / "values.yaml").read_text())) == ChartValues()


@pytest.mark.parametrize("values", [name for name, path in VALUES.items() if path])
def test_the_code_reads_values_as_helm_does(values: str) -> None:
    ChartValues.model_validate(yaml.safe_load((CHART / "ci" / values).read_text()))


def test_every_value_is_explained() -> None:
    schema = ChartValues.model_json_schema()
    sections = {"ChartValues": schema} | schema["$defs"]
    in_serve_files = ("RouterSection", "InstanceSection", "EngineSection", "SloClass", "StepCoefficients")
    unexplained = [
        f"{name}.{key}"
        for name, section in sections.items()
        if name not in in_serve_files and "properties" in section
        for key, value in section["properties"].items()
        if "description" not in sections.get(value.get("$ref", "").rpartition("/")[2], value)
        and "description" not in value
    ]
    assert unexplained == []


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["router.replicas='2'"], "at '/router/replicas': got string, want integer"),
        (["workers.drain=3"], "at '/workers': additional properties 'drain' not allowed"),
        (["router.settings.max_que=3"], "at '/router/settings': additional properties 'max_que' not allowed"),
        (['workers.groups=[{"name": "A", "role": "colocated"}]'], "at '/workers/groups/0/name'"),
        (['workers.groups=[{"name": "a", "role": "both"}]'], "value must be one of 'prefill', 'decode', 'colocated'"),
        (["workers.groups=[]"], "at '/workers/groups': minItems"),
        (['model.source="bucket"'], "at '/model/source': value must be one of"),
        (['model.source="persistentVolumeClaim"'], "name the claim with model.persistentVolumeClaim"),
        (['model.source="hostPath"'], "name the folder of the nodes with model.hostPath"),
        (['model.source="download"'], "name the repository with model.download.repository"),
        (['workers.groups=[{"name": "a", "role": "prefill"}]'], "there is no decode group"),
        (['workers.groups=[{"name": "a", "role": "decode"}]'], "there is no prefill group"),
        (
            ['workers.groups=[{"name": "a", "role": "colocated"}, {"name": "a", "role": "colocated"}]'],
            "two groups have the name 'a'; give each its own",
        ),
        (['workers.groups=[{"name": "router", "role": "colocated"}]'], "'router' is the name of another object"),
        (
            ['workers.groups=[{"name": "a", "role": "colocated", "instance": {"engine": {"tp": 2}}, "gpus": 1}]'],
            "'a' has 2 ranks (instance.engine.tp x pp) and 1 GPUs; set gpus to 2",
        ),
        (
            ['workers.groups=[{"name": "a", "role": "colocated", "instance": {"engine": {"device": "cuda"}}}]'],
            "'a' computes on cuda and gets no GPU; set gpus to 1",
        ),
        (['workers.defaults.rollout={"maxSurge": 0}'], "'prefill' could never be updated"),
        (["workers.defaults.ranksPerPod=[0, 1]"], "at '/workers/defaults/ranksPerPod/0': minimum"),
        (
            ["workers.kind='LeaderWorkerSet'", "workers.defaults.ranksPerPod=[1, 1]"],
            "'prefill' has 1 ranks (instance.engine.tp x pp), and its ranksPerPod has 2; let it have 1",
        ),
        (
            [
                "workers.kind='LeaderWorkerSet'",
                "workers.defaults.ranksPerPod=[3, 2, 1]",
                "workers.defaults.instance.engine={'tp': 6}",
            ],
            "'prefill' has other ranksPerPod in each pod, [3,2,1]; all pods but the first need the same number",
        ),
        *(
            (
                [
                    f"workers.kind='{kind}'",
                    "workers.defaults={'ranksPerPod': [1, 1], 'instance': {'engine': {'pp': 2}}}",
                ],
                f"'prefill' has instances of 2 pods, and those of a {kind} have one; set workers.kind",
            )
            for kind in ("Deployment", "Controller")
        ),
        (
            [
                "workers.kind='RayCluster'",
                "workers.defaults={'ranksPerPod': [2, 1], 'instance': {'engine': {'tp': 3}}}",
            ],
            "'prefill' has other ranksPerPod in each pod, [2,1]; all pods of a group of a RayCluster are alike",
        ),
        (
            [
                "workers.kind='LeaderWorkerSet'",
                "workers.defaults.ranksPerPod=[1, 1]",
                "workers.defaults.instance={'engine': {'pp': 2}, 'transport': 'shared_memory'}",
            ],
            "whose KV others cannot reach by shared_memory; leave out instance.transport",
        ),
        (["workers.kind='LeaderWorkerSet'", "fullnameOverride='7b'"], "the name 7b of the LeaderWorkerSet does not"),
        (
            ["workers.kind='RayCluster'", "workers.groups=[{'name': 'a', 'role': 'colocated', 'replicas': 0}]"],
            "'a' has no replicas; leave the group out of a RayCluster",
        ),
        (
            [
                "workers.kind='RayCluster'",
                "workers.defaults.autoscaling.enabled=true",
                "monitoring.prometheusAddress='http://p:9090'",
            ],
            "'prefill' is scaled by KEDA, which cannot scale a group of a RayCluster",
        ),
        (
            ["workers.kind='RayCluster'", "workers.defaults.extraEnv=[{'name': 'RAY_REDIS_ADDRESS', 'value': 'r'}]"],
            "the variable RAY_REDIS_ADDRESS is KubeRay's to set; leave it out of extraEnv",
        ),
        (
            [
                "workers.kind='Controller'",
                "workers.defaults.autoscaling.enabled=true",
                "monitoring.prometheusAddress='p'",
            ],
            "is scaled by KEDA, which cannot scale a group of a Controller",
        ),
        (["workers.kind='Controller'", "workers.defaults.replicas=0"], "has no replicas; leave the group out of a"),
        (["workers.kind='RayCluster'", "fullnameOverride='7b'"], "does not begin with a letter; set fullnameOverride"),
        (
            ["workers.kind='RayCluster'", "workers.ray.version='latest'"],
            "workers.ray.version is 'latest'; give the version of the Ray in the image",
        ),
        (["router.autoscaling.enabled=true"], "there is no monitoring.prometheusAddress; set it"),
        (["workers.defaults.autoscaling.enabled=true"], "'prefill' is scaled by metrics, and there is no monitoring"),
        (["apiKeys.clientKey='probe'"], "apiKeys.clientKey is a key of the Secret apiKeys.existingSecret"),
        (["tls.publicSecret='tls'"], "tls.publicName is not set; it is a name that the certificate"),
        (
            ["apiKeys.existingSecret='keys'", "monitoring.serviceMonitor.enabled=true"],
            "with API keys Prometheus needs one: set apiKeys.clientKey, or router.settings.open_metrics to true",
        ),
        (
            ["router.autoscaling={'enabled': true, 'minReplicas': 9}", "monitoring.prometheusAddress='http://p:9090'"],
            "router.autoscaling.minReplicas is 9, above maxReplicas 8",
        ),
    ],
)
def test_bad_values_fail_with_a_sentence(settings: list[str], sentence: str) -> None:
    ended = try_render(*(part for each in settings for part in ("--set-json", each.replace("'", '"'))))
    assert ended.returncode != 0
    assert sentence in ended.stderr


# --- pods ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", VALUES)
def test_no_pod_may_more_than_it_needs(values: str) -> None:
    for template in pod_templates(render(VALUES[values])):
        spec = template["spec"]
        uses_api = "tandem.serve/pods" in template["metadata"].get("annotations", {})
        assert spec["automountServiceAccountToken"] is uses_api
        assert spec["serviceAccountName"].endswith("-controller") is uses_api
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"]["drop"] == ["ALL"]
            assert set(security["capabilities"].get("add", [])) <= {"IPC_LOCK"}
            assert container["resources"]["requests"]
            assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("values", [name for name in VALUES if name not in (ON_RAY, WITH_CONTROLLER)])
def test_processes_read_the_settings_that_pods_give_them(values: str, tmp_path: Path) -> None:
    documents = render(VALUES[values])
    path = tmp_path / "settings.yaml"
    epochs, roles = set(), set()
    for template in pod_templates(documents):
        if SETTINGS not in template["metadata"].get("annotations", {}):
            continue
        path.write_text(settings_of(template))
        (container,) = template["spec"]["containers"]
        assert container["args"][:2] == [container["name"], "/etc/tandem/settings.yaml"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) <= {volume["name"] for volume in template["spec"]["volumes"]}
        grace_s = float(container["args"][container["args"].index("--grace") + 1])
        assert template["spec"]["terminationGracePeriodSeconds"] >= grace_s + 15
        if container["name"] == "router":
            router = load_config(path, RouterConfig)
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            for name in ("http", "grpc", "control"):
                assert getattr(router.router, name) == f"0.0.0.0:{ports[name]}"
            continue
        if container["name"] == "ranks":
            continue  # `test_leader_worker_set.py`
        worker = load_config(path, WorkerConfig)
        assert worker.model_hash == ("0123456789abcdef" if values == "gpu-values.yaml" else None)
        assert worker.served_name == router_name(documents, tmp_path)
        (address,) = worker.routers
        host, port = address.split(":")
        service = find(documents, "Service", host.removesuffix(f".{NAMESPACE}.svc"))
        assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)
        assert service["spec"]["ports"][0]["port"] == int(port)
        assert "listen=$(POD_IP):8003" in container["args"]
        if worker.cluster_tls is None:
            assert container["livenessProbe"]["grpc"] == {"port": 8003, "service": "liveness"}
            assert container["readinessProbe"]["grpc"] == {"port": 8003}
        else:
            assert container["livenessProbe"]["tcpSocket"] == {"port": 8003}
            assert mounts["cluster-tls"] == str(worker.cluster_tls.ca.parent)
        assert mounts["shm"] == "/dev/shm"
        epochs.add(worker.plan_epoch)
        roles.add(worker.role)
    assert len(epochs) == 1
    assert roles


def test_the_controller_reads_the_settings_that_its_pod_gives_it(tmp_path: Path) -> None:
    documents = render(VALUES[WITH_CONTROLLER])
    deployment = find(documents, "Deployment", "chat-controller")
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    files = {}
    for volume in template["spec"]["volumes"]:
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        for item in volume.get("downwardAPI", {}).get("items", ()):
            annotation = re.fullmatch(r"metadata\.annotations\['(.*)'\]", item["fieldRef"]["fieldPath"])
            assert annotation is not None
            path = tmp_path / item["path"]
            path.write_text(template["metadata"]["annotations"][annotation[1]])
            files[f"{mounts[volume['name']]}/{item['path']}"] = path
    assert (container["args"][0], container["args"][2]) == ("controller", "--pods")
    config = load_config(files[container["args"][1]], ServeConfig)
    pods = load_config(files[container["args"][3]], PodSettings)
    assert not config.start_router
    assert [each.name for each in config.router.slo] == ["chat"]
    assert config.controller == f"0.0.0.0:{container['ports'][0]['containerPort']}"
    assert config.served_name == router_name(documents, tmp_path)
    assert [(role, kind.instances, kind.pod_group) for role, kind in config.kinds] == [
        ("prefill", 2, None),
        ("decode", 4, None),
        ("decode", 1, "wide"),
    ]
    assert (pods.deployment, pods.config_map) == (deployment["metadata"]["name"], "chat-controller")
    assert find(documents, "ConfigMap", pods.config_map).keys() == {"apiVersion", "kind", "metadata"}
    for address in (*pods.routers, config.router.control):
        host, port = address.split(":")
        service = find(documents, "Service", host.removesuffix(f".{NAMESPACE}.svc"))
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["ports"][0]["port"] == int(port)
    (binding,) = (each for each in documents if each["kind"] == "RoleBinding")
    account = {"kind": "ServiceAccount", "name": "chat-controller", "namespace": NAMESPACE}
    assert binding["subjects"] == [account]
    assert template["spec"]["serviceAccountName"] == account["name"]
    assert find(documents, "ServiceAccount", account["name"])


def test_routers_of_a_controller_announce_themselves(tmp_path: Path) -> None:
    documents = render(VALUES[WITH_CONTROLLER])
    (template,) = (each for each in pod_templates(documents) if each["spec"]["containers"][0]["name"] == "router")
    path = tmp_path / "router.yaml"
    path.write_text(settings_of(template))
    router = load_config(path, RouterConfig)
    assert router.controller is not None
    host, port = router.controller.split(":")
    service = find(documents, "Service", host.removesuffix(f".{NAMESPACE}.svc"))
    assert service["spec"]["selector"]["app.kubernetes.io/component"] == "controller"
    assert service["spec"]["ports"][0]["port"] == int(port)
    assert template["spec"]["containers"][0]["args"][-2:] == ["--set", "advertise=$(POD_IP)"]


def router_name(documents: tuple[Document, ...], folder: Path) -> str:
    (template,) = (each for each in pod_templates(documents) if each["spec"]["containers"][0]["name"] == "router")
    path = folder / "router.yaml"
    path.write_text(settings_of(template))
    return load_config(path, RouterConfig).served_name


def worker_of(documents: tuple[Document, ...], group: str) -> Document:
    templates = pod_templates(documents)
    (found,) = (each for each in templates if each["metadata"]["labels"].get("tandem.serve/group") == group)
    return found


def test_devices_and_the_checkpoint_of_a_group() -> None:
    documents = render(VALUES["gpu-values.yaml"])
    (container,) = worker_of(documents, "prefill")["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 1, "rdma/hca": 1}
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    both = worker_of(documents, "both")["spec"]
    assert both["containers"][0]["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 2}
    assert "add" not in both["containers"][0]["securityContext"]["capabilities"]
    volumes = {volume["name"]: volume for volume in both["volumes"]}
    assert volumes["model"]["persistentVolumeClaim"] == {"claimName": "checkpoints", "readOnly": True}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert "model: /models/llama/Llama-3.1-8B-Instruct\n" in settings_of(worker_of(documents, "both"))


def test_the_epoch_changes_with_what_makes_instances_unlike_and_with_nothing_else() -> None:
    def epoch(*settings: str) -> str:
        template = worker_of(render(None, *settings), "decode")
        label = str(template["metadata"]["labels"]["tandem.serve/plan-epoch"])
        assert f"plan_epoch: {label}\n" in settings_of(template).replace('"', "")
        return label

    same = (
        "router.replicas=5",
        "workers.defaults.replicas=3",
        'workers.defaults.nodeSelector={"a": "b"}',
        'router.settings={"max_queue": 5}',
    )
    assert {epoch(each) for each in same} == {epoch()}
    others = ('image.tag="2"', 'workers.defaults.instance={"max_batch": 7}', 'model.name="x"', 'planEpoch="3"')
    assert len({epoch(), *map(epoch, others)}) == 1 + len(others)


def test_names_and_versions_agree_with_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["version"] == chart["appVersion"] == project["version"]
    assert re.search(r"(?m)^  - tandem$|^name: tandem$", (CHART / "Chart.yaml").read_text())


# --- scaling and monitoring ------------------------------------------------------------------------------------------


def test_what_is_scaled_has_no_number_of_its_own() -> None:
    documents = render(VALUES["download-values.yaml"])
    scaled = {each["spec"]["scaleTargetRef"]["name"] for each in documents if each["kind"] == "ScaledObject"}
    assert scaled == {"chat-router", "chat-prefill", "chat-decode", "chat-both"}
    for document in documents:
        if document["kind"] == "Deployment":
            assert ("replicas" in document["spec"]) == (document["metadata"]["name"] not in scaled)
    assert find(documents, "Deployment", "chat-fixed")["spec"]["replicas"] == 0


def test_scaling_asks_for_metrics_that_exist() -> None:
    documents = [each for each in render(VALUES["download-values.yaml"]) if each["kind"] == "ScaledObject"]
    queries = [trigger["metadata"]["query"] for each in documents for trigger in each["spec"]["triggers"]]
    assert len(queries) == 5
    known = known_labels(make_cluster().dispatcher)
    for query in queries:
        for use in uses(query):
            added = {"namespace": NAMESPACE, "service": "chat"}  # by Prometheus
            given = {label: value for label, _, value in use.matchers}
            assert added.items() <= given.items(), query
            assert given.keys() - added.keys() <= known[use.metric], query
