"""The controller's pods, on an API server that is one only as far as `fake_api` says; no container runs."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from lightkube import AsyncClient, KubeConfig
from lightkube.config.models import Cluster, User

import tandem.deploy.kubernetes.pod_launcher
import tandem.deploy.kubernetes.pod_watch
from tandem.core.clock import SystemClock
from tandem.core.cluster_status import ClusterChange, ProcessState
from tandem.core.config import ServeConfig
from tandem.core.errors import ConfigError, NotFoundError, PermissionDeniedError, UnavailableError
from tandem.deploy.controller import Controller
from tandem.deploy.desired import Desired
from tandem.deploy.kubernetes.api import KubernetesApi
from tandem.deploy.kubernetes.instance_pod import CLUSTER, PodSettings
from tandem.deploy.kubernetes.kept_state import KeptState
from tandem.deploy.kubernetes.pod_launcher import PodLauncher
from tandem.deploy.kubernetes.pod_watch import PodWatch
from tandem.deploy.serving import Serving
from tandem.deploy.supervisor import Backoff
from tandem.deploy.topology import Machine, ProcessSpec
from tests.deploy.kubernetes.fake_api import TOKEN, FakeKubernetes, Idle
from tests.deploy.kubernetes.manifests import NAMESPACE, find, render
from tests.deploy.kubernetes.test_instance_pod import SECRET, chart_files

NAME = "r-tandem-controller"
PODS = Machine(cores=1, nodes=1)
FAST = Backoff(first_s=0.01, longest_s=0.1, healthy_after_s=60.0)


class Left(Exception):
    """In the place of the end of the process."""


def leave(line: str) -> NoReturn:
    raise Left(line)


class Connection(KubernetesApi):
    """That of one controller. After its death nothing is deleted any more, whatever its tasks do when they end."""

    is_dead = False

    async def delete_pod(self, name: str, grace_s: int) -> None:
        if not self.is_dead:
            await super().delete_pod(name, grace_s)


class Bench:
    """A cluster's Kubernetes, and controllers of it, one after the other."""

    def __init__(self, kubernetes: FakeKubernetes, kubelet: Idle, config: ServeConfig, pods: PodSettings) -> None:
        self.kubernetes, self.kubelet, self.pods = kubernetes, kubelet, pods
        self.config = config.model_copy(update={"cluster_token": SECRET})

    def connect(self, token: str = TOKEN) -> Connection:
        cluster, user = Cluster(server=self.kubernetes.url), User(token=token)
        return Connection(AsyncClient(KubeConfig.from_one(cluster=cluster, user=user, namespace=NAMESPACE)))

    @asynccontextmanager
    async def controller(self, *, plan_epoch: str = "", load_timeout_s: float = 20.0) -> AsyncIterator[Serving]:
        """Its end leaves the pods, as the end of the process does."""
        api = self.connect()
        pods = self.pods.model_copy(update={"plan_epoch": plan_epoch or self.pods.plan_epoch})
        watch, state = PodWatch(api, {CLUSTER: pods.cluster}), KeptState(api, NAME, "a", SECRET, leave)

        async def introduce(spec: ProcessSpec, address: str) -> str:
            assert address == "127.0.0.1:8003"
            return f"{spec.name}-id"

        launcher = PodLauncher(
            api,
            watch,
            pods,
            introduce,
            state.check_in_charge,
            SystemClock(),
            token="file:/run/secrets/tandem/token",
            secret=SECRET,
            load_timeout_s=load_timeout_s,
        )
        kept, _ = await state.load()
        desired = kept or Desired(self.config)
        serving = Serving(
            desired,
            lambda: PODS,
            launcher,
            SystemClock(),
            save=state.save,
            tells_routers=False,
            read_log=launcher.read_log,
        )
        serving.controller = Controller(
            launcher, SystemClock(), FAST, starts_first=lambda spec: pods.group_of(spec).starts_first
        )
        following = asyncio.create_task(watch.run())
        try:
            await state.save(desired)
            serving.take_back(await launcher.find_left_running())
            yield serving
        finally:
            api.is_dead = True
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await serving.controller.kill()
            await api.close()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    config, pods = chart_files(tmp_path, None)
    documents, kubelet = render(None, 'workers.kind="Controller"'), Idle()
    objects = [find(documents, kind, NAME) for kind in ("ConfigMap", "Deployment")]
    kubernetes = kubelet.kubernetes = FakeKubernetes(kubelet, find(documents, "Role", NAME)["rules"], objects)
    async with kubernetes.serve():
        yield Bench(kubernetes, kubelet, config, pods)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - of an object that tells nobody
            await asyncio.sleep(0.01)


def pod_names(bench: Bench) -> dict[str, str]:
    return {process: pod["metadata"]["name"] for process, pod in bench.kubernetes.pods().items()}


def notes(serving: Serving) -> dict[str, str]:
    return {status.name: status.note for status in serving.status().processes}


# --- commands --------------------------------------------------------------------------------------------------------


async def test_a_cluster_is_scaled_drained_and_stopped(bench: Bench) -> None:
    async with bench.controller() as serving:
        assert await serving.start() == ClusterChange(started=("prefill-0", "decode-0"))
        first = pod_names(bench)
        assert {status.instance_id for status in serving.status().processes} == {"prefill-0-id", "decode-0-id"}
        assert await serving.scale({"decode": 3}) == ClusterChange(started=("decode-1", "decode-2"))
        await serving.scale({"decode": 2}, 40.0)
        assert bench.kubelet.graces == [("decode-2", 55)]
        await serving.drain("decode-1", 0.0)
        assert set(pod_names(bench)) == {"prefill-0", "decode-0"}
        await serving.drain("decode-1", undo=True)
        assert pod_names(bench).items() >= first.items(), "nothing else was replaced"
        assert SECRET not in json.dumps(bench.kubernetes.config_map(NAME))
        assert SECRET not in json.dumps(bench.kubernetes.pods())
        await serving.stop(0.0)
    assert bench.kubernetes.pods() == {}


async def test_logs_are_those_of_the_newest_pod(bench: Bench) -> None:
    async with bench.controller() as serving:
        await serving.start()
        pod = pod_names(bench)["decode-0"]
        assert [part async for part in serving.logs("decode-0", 2, follow=False)] == [
            [f"{pod} line 0"],
            [f"{pod} line 1"],
        ]
        followed = [part async for part in serving.logs("decode-0-id", 1, follow=True)]
        assert followed == [[f"{pod} line 0"], ["a later line"]]
        with pytest.raises(NotFoundError, match="the cluster has no process 'decode-9'"):
            await anext(serving.logs("decode-9", 1, follow=False))


async def test_roles_change_without_another_pod(bench: Bench) -> None:
    async with bench.controller() as serving:
        await serving.start()
        await serving.scale({"prefill": 2})
        before = pod_names(bench)
        await serving.apply(json.dumps({"model": str(bench.config.model), "prefill": {}, "decode": {"instances": 2}}))
        assert pod_names(bench) == before
        assert [status.role for status in serving.status().processes] == ["prefill", "decode", "decode"]


async def test_the_controller_has_the_rights_that_it_uses_and_no_others(bench: Bench) -> None:
    async with bench.controller() as serving:
        await serving.start()
        await serving.scale({"decode": 2})
        await serving.scale({"decode": 1}, 0.0)
        assert [part async for part in serving.logs("decode-0", 1, follow=False)]
    rules = find(render(None, 'workers.kind="Controller"'), "Role", NAME)["rules"]
    given = {(verb, resource) for rule in rules for verb in rule["verbs"] for resource in rule["resources"]}
    assert bench.kubernetes.asked == given


# --- what happens to pods --------------------------------------------------------------------------------------------


async def test_a_pod_that_ends_or_is_deleted_is_replaced(bench: Bench) -> None:
    async with bench.controller() as serving:
        await serving.start()
        before = pod_names(bench)
        bench.kubernetes.end_container(before["decode-0"], 1, "started\nthe engine has failed\n")
        await until(lambda: pod_names(bench).get("decode-0", before["decode-0"]) != before["decode-0"])
        assert notes(serving)["decode-0"].endswith("worker ended with status 1 (Error): the engine has failed")
        bench.kubernetes.delete(before["prefill-0"])
        await until(lambda: pod_names(bench).get("prefill-0", before["prefill-0"]) != before["prefill-0"])
        await until(lambda: all(status.state is ProcessState.UP for status in serving.status().processes))
        assert {status.failures for status in serving.status().processes} == {0, 1}, "what was deleted has not failed"


async def test_a_pod_on_a_node_that_does_not_answer_is_replaced(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tandem.deploy.kubernetes.pod_launcher, "NOT_READY_S", 0.2)
    monkeypatch.setattr(tandem.deploy.kubernetes.pod_launcher, "_LOOK_S", 0.1)
    async with bench.controller() as serving:
        await serving.start()
        before = pod_names(bench)
        bench.kubernetes.make_unready(before["decode-0"])
        await until(lambda: pod_names(bench).get("decode-0", before["decode-0"]) != before["decode-0"])
        assert "has not been ready for" in notes(serving)["decode-0"]
        assert pod_names(bench)["prefill-0"] == before["prefill-0"]


async def test_a_pod_for_which_there_is_no_node(bench: Bench) -> None:
    bench.kubelet.makes_ready = False
    async with bench.controller(load_timeout_s=0.5) as serving:
        starting = asyncio.create_task(serving.start())
        await until(lambda: len(bench.kubernetes.pods()) == 2)
        for name in pod_names(bench).values():
            reason = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available"}
            bench.kubernetes.set_status(name, conditions=[reason])
        with pytest.raises(UnavailableError, match=r"not ready within 0\.5 s: no node takes its pod: 0/1 nodes are"):
            await starting
        bench.kubelet.makes_ready = True
        await until(lambda: all(status.state is ProcessState.UP for status in serving.status().processes))
    assert len(bench.kubernetes.pods()) == 2


async def test_an_api_that_is_away_ends_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tandem.deploy.kubernetes.pod_watch, "_AGAIN_S", 0.05)
    async with bench.controller() as serving:
        await serving.start()
        before = pod_names(bench)
        bench.kubernetes.is_away = True
        bench.kubernetes.compact()
        with pytest.raises(UnavailableError, match="the server is starting"):
            await serving.scale({"decode": 2})
        assert serving.config.decode[0].instances == 1, "what could not be kept is not done"
        assert {status.state for status in serving.status().processes} == {ProcessState.UP}
        bench.kubernetes.is_away = False
        await serving.scale({"decode": 2})
        assert pod_names(bench).items() > before.items()


# --- the next controller ---------------------------------------------------------------------------------------------


async def test_the_next_controller_takes_the_pods_back(bench: Bench) -> None:
    async with bench.controller() as serving:
        await serving.start()
        await serving.scale({"decode": 2})
    before = pod_names(bench)
    assert set(before) == {"prefill-0", "decode-0", "decode-1"}
    bench.kubernetes.end_container(before["decode-1"], 1)
    async with bench.controller() as serving:
        assert set((await serving.start()).started) == {"decode-1"}
        after = pod_names(bench)
        assert {name for name in before if before[name] != after[name]} == {"decode-1"}


async def test_pods_of_another_epoch_are_replaced_one_after_the_other(bench: Bench) -> None:
    async with bench.controller() as serving:
        await serving.start()
    before = pod_names(bench)
    async with bench.controller(plan_epoch="2") as serving:
        assert await serving.start() == ClusterChange(replaced=("prefill-0", "decode-0"))
        assert pod_names(bench).items().isdisjoint(before.items())
    assert [process for process, _ in bench.kubelet.graces] == ["prefill-0", "decode-0"]
    assert bench.kubelet.num_pods == [3, 3], "each one was there before the other left"


async def test_of_two_controllers_the_older_one_leaves(bench: Bench) -> None:
    api = bench.connect()
    older, newer = (KeptState(api, NAME, settings, SECRET, leave) for settings in "ab")
    assert await older.load() == (None, False)
    desired = Desired(bench.config)
    await older.save(desired)
    await older.check_in_charge()
    assert await older.load() == (desired, True)
    assert await newer.load() == (desired, False), "the chart's settings have changed since"
    await newer.save(desired)
    with pytest.raises(Left, match="another controller has taken charge of r-tandem-controller"):
        await older.check_in_charge()
    with pytest.raises(Left):
        await older.save(desired)
    await newer.check_in_charge()
    await api.close()


async def test_what_the_service_account_may_not_do(bench: Bench) -> None:
    other_token, api = bench.connect("another token"), bench.connect()
    with pytest.raises(PermissionDeniedError, match="Kubernetes refuses pods: Unauthorized"):
        await other_token.list_pods({})
    with pytest.raises(PermissionDeniedError, match='configmaps "other" is forbidden'):
        await api.read_config_map("other")
    with pytest.raises(ConfigError, match="Kubernetes refuses pod x: "):
        await api.create_pod({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": 1}})
    await api.delete_pod("gone", 1)
    await other_token.close()
    await api.close()
