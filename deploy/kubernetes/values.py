"""The values of the Helm chart in `chart/`. `tandem schema values` prints them as its values.schema.json, and
`tandem render-k8s` writes them.

Names are those of the values file: camel case, as in Kubernetes. `settings` and `instance` hold Tandem's own settings
under their own names, as in a serve file.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from tandem.core.frozen_model import FrozenModel
from tandem.core.instance_section import InstanceSection, RoleName
from tandem.core.router_section import RouterSection

KubernetesObject = dict[str, Any]
"""Fields of a kind of Kubernetes; the API server checks them."""
Replicas = Annotated[int, Field(ge=0)]
Quantity = Annotated[str, Field(pattern=r"^[0-9.]+([KMGTPE]i?|m)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=20)]


class Image(FrozenModel):
    """The image of routers and workers; `Dockerfile` builds it."""

    repository: str = Field(default="tandem-serve", description="With the registry, if it is not the nodes' default")
    tag: str = Field(default="", description="Empty: the chart's appVersion")
    digest: str = Field(default="", pattern=r"^(sha256:[0-9a-f]{64})?$", description="Goes before the tag")
    pullPolicy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="When a node pulls the image"
    )


class Download(FrozenModel):
    """Each pod downloads the checkpoint before it starts; routers take its small files only."""

    repository: str = Field(default="", description="On the Hugging Face hub, such as Qwen/Qwen3-8B")
    revision: str = Field(
        default="main", description="A commit is safer than a branch: all pods then have equal weights"
    )
    sizeLimit: Quantity = Field(default="200Gi", description="Of the pod's volume")
    tokenSecret: str = Field(default="", description="Secret with a token of the hub; empty: none")
    tokenKey: str = Field(default="token", description="The key in that Secret")


class ModelValues(FrozenModel):
    """Where pods find the checkpoint."""

    source: Literal["builtIn", "persistentVolumeClaim", "hostPath", "download"] = Field(
        default="builtIn", description="builtIn: the small model in the image, to try things out"
    )
    name: str = Field(default="", description="In the API; empty: the last part of the path or of the repository")
    path: str = Field(default="", description="The checkpoint's folder in the volume")
    hash: str = Field(
        default="",
        pattern=r"^([0-9a-f]{8,64})?$",
        description="Beginning of the hash of its files, as a worker's log says it; other files are refused",
    )
    persistentVolumeClaim: str = Field(default="", description="Name of the claim; it is mounted read-only")
    hostPath: str = Field(default="", description="Folder of each node")
    download: Download = Download()


class ClusterToken(FrozenModel):
    """The secret that routers and workers share."""

    existingSecret: str = Field(
        default="", description="Empty: Helm makes a Secret with a random token, and keeps it over upgrades"
    )
    key: str = Field(default="token", description="The key in the Secret")


class ApiKeys(FrozenModel):
    """Keys of clients, as `tandem key` makes them."""

    existingSecret: str = Field(default="", description="Empty: everybody who reaches a router may use it")
    key: str = Field(default="keys", description="The key in the Secret with the file of keys")
    clientKey: str = Field(
        default="", description="The key in the Secret with one client's own key, for helm test and the ServiceMonitor"
    )


class Tls(FrozenModel):
    """Secrets with tls.crt, tls.key and ca.crt, as cert-manager makes them. Renewed certificates are read again."""

    clusterSecret: str = Field(
        default="", description="For the ports between routers and workers, both ends; empty: no TLS there"
    )
    serverName: str = Field(default="tandem", description="A name that the certificate of clusterSecret has")
    publicSecret: str = Field(default="", description="For the ports of clients; empty: no TLS there")
    publicName: str = Field(
        default="", description="A name that the certificate of publicSecret has, for helm test and the ServiceMonitor"
    )


class ServiceValues(FrozenModel):
    """For clients: ports 8000 (HTTP) and 8001 (gRPC)."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field(default="ClusterIP", description="Who reaches it")
    annotations: dict[str, str] = Field(default={}, description="Of the Service, for load balancers")


class Resources(FrozenModel):
    """Of the container."""

    requests: KubernetesObject = Field(default={}, description="By which the pod is placed")
    limits: KubernetesObject = Field(default={}, description="A limit of cpu makes steps uneven; set none")


class Scheduling(FrozenModel):
    """Which nodes, and what else a pod gets."""

    podAnnotations: dict[str, str] = Field(default={}, description="Such as networks of RDMA devices")
    nodeSelector: dict[str, str] = Field(default={}, description="Labels that a node must have")
    tolerations: list[KubernetesObject] = Field(default=[], description="Taints of nodes that the pod may have")
    affinity: KubernetesObject = Field(default={}, description="To nodes and to other pods")
    topologyKey: str = Field(
        default="kubernetes.io/hostname",
        description="Label of nodes over which equal pods are spread; empty: they are not",
    )
    priorityClassName: str = Field(default="", description="Empty: the cluster's default")
    extraEnv: list[KubernetesObject] = Field(default=[], description="Variables of the container, such as NCCL_IB_HCA")


class Scaling(FrozenModel):
    """By KEDA, which must be installed."""

    enabled: bool = Field(default=False, description="In the place of replicas; needs monitoring.prometheusAddress")
    minReplicas: int = Field(default=1, ge=1, description="Never fewer")
    maxReplicas: int = Field(default=4, ge=1, description="Never more")


class RouterScaling(Scaling):
    """By KEDA, on the requests that routers hold."""

    minReplicas: int = Field(default=2, ge=1, description="Never fewer")
    maxReplicas: int = Field(default=8, ge=1, description="Never more")
    requestsPerReplica: int = Field(default=500, ge=1, description="Running and queued ones")


class RouterValues(Scheduling):
    """They hold no state but the requests that run through them."""

    replicas: Replicas = Field(default=2, description="Routers; each knows all instances")
    settings: RouterSection = Field(
        default=RouterSection(), description="As in the section `router` of a serve file; the chart sets the addresses"
    )
    drainSeconds: int = Field(default=60, ge=0, description="Running requests may take so long to end after SIGTERM")
    resources: Resources = Resources(requests={"cpu": "1", "memory": "1Gi"}, limits={"memory": "2Gi"})
    service: ServiceValues = ServiceValues()
    autoscaling: RouterScaling = RouterScaling()


class Rdma(FrozenModel):
    """Devices for RDMA. The container then has the capability IPC_LOCK."""

    resource: str = Field(default="", description="As the device plugin calls it, such as rdma/hca; empty: none")
    count: int = Field(default=1, ge=1, description="Of each pod")


class Rollout(FrozenModel):
    """How pods of a group are replaced. Without spare devices, set maxSurge 0 and maxUnavailable 1."""

    maxSurge: int = Field(default=1, ge=0, description="Pods beyond replicas meanwhile")
    maxUnavailable: int = Field(default=0, ge=0, description="Pods fewer than replicas meanwhile")


class WorkerScaling(Scaling):
    """By KEDA: prefill groups by waiting prompt tokens, decode groups by KV memory in use, colocated ones by both."""

    waitingTokensPerReplica: int = Field(default=4096, ge=1, description="Prompt tokens that wait for an instance")
    kvShare: float = Field(default=0.7, gt=0, le=1, description="Share of an instance's KV memory in use")


class WorkerDefaults(Scheduling):
    """An instance is one pod, or several with `ranksPerPod`."""

    replicas: Replicas = Field(default=1, description="Instances")
    instance: InstanceSection = Field(
        default=InstanceSection(), description="As in the sections prefill, decode and colocated of a serve file"
    )
    ranksPerPod: list[Annotated[int, Field(ge=1)]] = Field(
        default=[],
        description="Ranks in each pod of an instance that no node has room for, rank 0's pod first, all others alike; "
        "together instance.engine.tp x pp. Needs workers.kind LeaderWorkerSet or RayCluster. Empty: one pod has all",
    )
    gpus: int = Field(default=0, ge=0, description="Of each instance: instance.engine.tp x pp")
    gpuResource: str = Field(default="nvidia.com/gpu", description="As the device plugin calls a GPU")
    rdma: Rdma = Rdma()
    shmSize: Quantity = Field(default="1Gi", description="Of /dev/shm; it counts as memory of the container")
    resources: Resources = Resources(requests={"cpu": "1", "memory": "2Gi"}, limits={"memory": "4Gi"})
    rollout: Rollout = Rollout()
    autoscaling: WorkerScaling = WorkerScaling()
    runtimeClassName: str = Field(default="", description="Such as nvidia; empty: the cluster's default")


class WorkerGroup(WorkerDefaults):
    """Equal instances. What a group leaves out, it has from workers.defaults."""

    name: Name = Field(description="Unique; part of the pods' names")
    role: RoleName = Field(description="Which requests routers send")


class RayHead(Scheduling):
    """Of workers.kind RayCluster: the pod with Ray's head and Tandem's controller. It runs no instance."""

    version: str = Field(default="2.60.0", description="Of the Ray in the image; the operator goes by it")
    resources: Resources = Resources(requests={"cpu": "2", "memory": "4Gi"}, limits={"memory": "8Gi"})


class ControllerValues(Scheduling):
    """Of workers.kind Controller: the pod with Tandem's controller, which makes the pods of the instances."""

    resources: Resources = Resources(requests={"cpu": "250m", "memory": "512Mi"}, limits={"memory": "1Gi"})


class Workers(FrozenModel):
    """The instances, in groups of equal ones."""

    kind: Literal["Deployment", "LeaderWorkerSet", "RayCluster", "Controller"] = Field(
        default="Deployment",
        description="What keeps the instances; LeaderWorkerSet, or KubeRay for RayCluster, must be installed",
    )
    ray: RayHead = RayHead()
    controller: ControllerValues = ControllerValues()
    drainSeconds: int = Field(default=120, ge=0, description="Running requests may take so long to end after SIGTERM")
    loadSeconds: int = Field(default=900, ge=1, description="For an instance to load its model")
    defaults: WorkerDefaults = Field(default=WorkerDefaults(), description="What a group has if it does not say else")
    groups: list[WorkerGroup] = Field(
        default=[WorkerGroup(name="prefill", role="prefill"), WorkerGroup(name="decode", role="decode")],
        min_length=1,
        description="A list of yours replaces these",
    )


class PodDisruptionBudget(FrozenModel):
    """At most one instance of a group is away on purpose; for groups of several instances."""

    enabled: bool = Field(default=True, description="Make them")


class NetworkPolicy(FrozenModel):
    """Workers talk to routers and workers of this release only."""

    enabled: bool = Field(default=True, description="Make them; the cluster's network must support them")
    clients: list[KubernetesObject] = Field(default=[], description="Peers that reach HTTP and gRPC; empty: everybody")
    metrics: list[KubernetesObject] = Field(default=[], description="Peers that reach HTTP, to scrape, besides clients")
    extraEgress: list[KubernetesObject] = Field(default=[], description="Besides this release and DNS")
    apiServerPorts: list[int] = Field(
        default=[443, 6443], description="Of Kubernetes' API, for the controller: its address is no pod's"
    )


class ServiceAccount(FrozenModel):
    """No pod but the one of workers.kind Controller uses the API of Kubernetes; the token of others is not mounted."""

    create: bool = Field(default=True, description="Make one")
    name: str = Field(
        default="",
        description="Empty: the release's name, or `default` where none is created; the controller's own has "
        "-controller at its end, or this name where none is created",
    )
    annotations: dict[str, str] = Field(default={}, description="Of the ServiceAccount")


class ServiceMonitor(FrozenModel):
    """Routers are scraped: they report all instances. Needs the Prometheus operator."""

    enabled: bool = Field(default=False, description="Make it")
    interval: str = Field(default="10s", description="Between two scrapes")
    labels: dict[str, str] = Field(default={}, description="By which a Prometheus selects it")


class Rules(FrozenModel):
    """Alerts, as a PrometheusRule. Needs the Prometheus operator."""

    enabled: bool = Field(default=False, description="Make it")
    labels: dict[str, str] = Field(default={}, description="By which a Prometheus selects it")


class Dashboards(FrozenModel):
    """Grafana's, as ConfigMaps."""

    enabled: bool = Field(default=False, description="Make them")
    labels: dict[str, str] = Field(
        default={"grafana_dashboard": "1"}, description="By which Grafana's sidecar selects them"
    )


class Monitoring(FrozenModel):
    """Of Prometheus and Grafana."""

    serviceMonitor: ServiceMonitor = ServiceMonitor()
    rules: Rules = Rules()
    dashboards: Dashboards = Dashboards()
    prometheusAddress: str = Field(
        default="", description="For autoscaling, such as http://prometheus.monitoring:9090; KEDA asks there"
    )


class ChartValues(FrozenModel):
    """Values of the Helm chart `tandem`."""

    image: Image = Image()
    imagePullSecrets: list[dict[str, str]] = Field(default=[], description="Such as [{name: registry}]")
    nameOverride: str = Field(default="", description="In the place of the chart's name")
    fullnameOverride: str = Field(default="", description="In the place of the release's and the chart's name")
    model: ModelValues = ModelValues()
    planEpoch: str = Field(
        default="",
        pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$",
        max_length=40,
        description="KV moves only between instances of one epoch. Empty: a hash of image, model, roles and settings",
    )
    clusterToken: ClusterToken = ClusterToken()
    apiKeys: ApiKeys = ApiKeys()
    tls: Tls = Tls()
    router: RouterValues = RouterValues()
    workers: Workers = Workers()
    podDisruptionBudget: PodDisruptionBudget = PodDisruptionBudget()
    networkPolicy: NetworkPolicy = NetworkPolicy()
    serviceAccount: ServiceAccount = ServiceAccount()
    monitoring: Monitoring = Monitoring()
