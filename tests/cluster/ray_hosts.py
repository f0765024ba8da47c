"""`tandem serve --ray` and `tandem up --ray` on two hosts; see `ray_cluster`."""

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tandem.core.session import Role
from tests.cluster.ray_cluster import (
    ADDRESS_A,
    ADDRESS_B,
    HEAD,
    MODEL,
    SMALL,
    START_TIMEOUT_S,
    RayHosts,
    Served,
    no_workers_left,
    running_ray,
    serve,
    wait_for,
)
from tests.cluster.test_same_tokens import prompts, reference_tokens


@pytest.fixture(scope="module")
def hosts() -> Iterator[RayHosts]:
    with running_ray() as hosts:
        yield hosts


def plan_file(folder: Path, pp: int = 1, *, same_node: bool = False, **devices: list[list[str]]) -> Path:
    """The devices of each role's instances; prefill has `pp` stages. `same_node`: KV does not leave a node."""
    groups = [
        {
            "role": role,
            "instances": len(instances),
            "device": "CPU",
            "pp": pp if role == "prefill" else 1,
            "kv_tokens": 20_000,
            "devices": instances,
        }
        for role, instances in devices.items()
    ]
    path = folder / "plan.yaml"
    plan = {"version": 1, "model": str(MODEL), "verdict": "disaggregate", "groups": groups, "same_node": same_node}
    path.write_text(yaml.safe_dump(plan))
    return path


def pairs_file(folder: Path, *, same_node: bool = False) -> Path:
    """Two nodes with a pair each."""
    pairs = {"prefill": [["x:0"], ["y:0"]], "decode": [["x:1"], ["y:1"]]}
    return plan_file(folder, same_node=same_node, **pairs)


def reference() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and the tokens of transformers."""
    prompt_ids = [list(token_ids) for token_ids in prompts(4000) if len(token_ids) < 300][:8]
    return prompt_ids, [list(reference_tokens(MODEL, tuple(token_ids))) for token_ids in prompt_ids]


def test_a_plan_of_two_nodes_survives_the_loss_of_one(hosts: RayHosts) -> None:
    process, output = serve(hosts, str(pairs_file(hosts.folder)), *SMALL)
    served = Served(hosts)
    try:
        wait_for(process, output, r"^Ctrl-C ends it\.$")
        before = served.by_host()
        assert sorted(map(tuple, before.values())) == [("decode-0", "prefill-0"), ("decode-1", "prefill-1")]
        assert set(before) == {ADDRESS_A, ADDRESS_B}
        served.try_all_pairs()
        assert served.transports() == {(True, "shared_memory"), (False, "gloo")}

        (on_b,) = (instances[0] for host, instances in before.items() if host == ADDRESS_B)
        assert list(hosts.state_b.rglob(f"{on_b}.log"))
        assert not list(hosts.state.rglob(f"{on_b}.log"))
        logs = hosts.tandem("logs", on_b, "-n", "1000")
        assert "the hash of the files" in logs.stdout, logs.stdout + logs.stderr

        undisturbed = asyncio.run(served.answers(600))

        async def disturbed() -> list[tuple[int, ...]]:
            running = asyncio.create_task(served.answers(600))
            await asyncio.to_thread(served.until_b_decodes)
            await asyncio.to_thread(hosts.kill_b)
            assert not running.done(), "the host was lost too late to matter"
            return await running

        assert asyncio.run(disturbed()) == undisturbed
        wait_for(process, output, rf"its node {ADDRESS_B} has (died|not answered)")
        served.wait_instances({ADDRESS_A: ["decode-0", "decode-1", "prefill-0", "prefill-1"]})
        served.try_all_pairs()

        hosts.start_b()
        scaled = hosts.tandem("scale", "--decode", "3")
        assert scaled.returncode == 0, scaled.stdout + scaled.stderr
        assert served.by_host()[ADDRESS_B] == ["decode-2"], "the host that came back has the least load"
        served.try_all_pairs()

        applied = hosts.tandem("apply", str(pairs_file(hosts.folder)), *SMALL)
        assert applied.returncode == 0, applied.stdout + applied.stderr
        for name in before[ADDRESS_B]:
            assert f"{name} goes where the plan has it" in applied.stdout
        served.wait_instances(before)
        served.try_all_pairs()
    finally:
        process.terminate()
        process.wait(60)
    assert process.returncode == 0, output.read_text()
    assert no_workers_left(hosts.folder)


def test_kv_stays_on_its_node_where_the_plan_says_so(hosts: RayHosts) -> None:
    process, output = serve(hosts, str(pairs_file(hosts.folder, same_node=True)), *SMALL)
    served = Served(hosts)
    try:
        wait_for(process, output, r"^Ctrl-C ends it\.$")
        first = asyncio.run(served.answers(40))
        assert served.transports() == {(True, "shared_memory")}
        assert all(status.links for status in served.instances() if status.role is Role.DECODE)

        applied = hosts.tandem("apply", str(pairs_file(hosts.folder)), *SMALL)
        assert applied.returncode == 0, applied.stdout + applied.stderr
        assert applied.stdout.count("goes where the plan has it") == 4, "each may pair with all now"
        served.try_all_pairs()
        assert asyncio.run(served.answers(40)) == first
    finally:
        process.terminate()
        process.wait(60)
    assert process.returncode == 0, output.read_text()


def test_other_model_files_on_a_host_are_refused(hosts: RayHosts) -> None:
    served = hosts.tandem(
        "serve",
        "--ray",
        HEAD,
        f"--set=model={hosts.other}",
        *SMALL,
        "--set=prefill.instances=2",
        "--set=router.http=127.0.0.1:0",
    )
    assert served.returncode == 1, served.stdout + served.stderr
    text = rf"on {ADDRESS_B}: the model files in {hosts.other} are not those of the cluster: their hash is \w+, and "
    assert re.search(text, served.stderr), served.stdout + served.stderr
    assert no_workers_left(hosts.folder)


def test_nothing_outlives_a_command_that_is_killed(hosts: RayHosts) -> None:
    file = hosts.folder / "colocated.yaml"
    section = {"instances": 2, "engine": {"kv_memory": "64MiB", "threads": 1}}
    file.write_text(yaml.safe_dump({"model": str(MODEL), "colocated": section}))
    process, output = serve(hosts, str(file))
    wait_for(process, output, r"^Ctrl-C ends it\.$")
    assert set(Served(hosts).by_host()) == {ADDRESS_A, ADDRESS_B}
    process.kill()
    process.wait(10)
    assert no_workers_left(hosts.folder)


def test_a_cluster_outlives_the_command_and_its_controller(hosts: RayHosts) -> None:
    ports = [f"--set=router.{name}=127.0.0.1:0" for name in ("http", "grpc", "control")]
    up = hosts.tandem("up", "--ray", HEAD, f"--set=model={MODEL}", *SMALL, *ports)
    assert up.returncode == 0, up.stdout + up.stderr
    served = Served(hosts)
    try:
        before = {status.instance_id for status in served.instances()}
        (controller,) = (each for each in psutil.process_iter() if each.name().startswith("ray::RayContro"))
        controller.kill()
        until_s = time.monotonic() + START_TIMEOUT_S
        while (status := hosts.tandem("status")).returncode:
            assert time.monotonic() < until_s, status.stderr
        scaled = hosts.tandem("scale", "--decode", "2")
        assert scaled.returncode == 0, scaled.stdout + scaled.stderr
        after = {status.instance_id for status in served.instances()}
        assert before < after, "the next controller has taken them back"
        served.try_all_pairs()

        again = hosts.tandem("up", "--ray", HEAD)
        assert again.returncode == 2
        assert "runs already (on the Ray cluster" in again.stderr
        hosts.environment["TANDEM_STATE_DIR"] = str(hosts.folder / "elsewhere")
        found = hosts.tandem("up", "--ray", HEAD)
        assert found.returncode == 0, found.stderr
        assert "found tiny-python" in found.stdout
    finally:
        hosts.environment["TANDEM_STATE_DIR"] = str(hosts.state)
        down = hosts.tandem("down")
    assert down.returncode == 0, down.stdout + down.stderr
    assert no_workers_left(hosts.folder)
    assert hosts.tandem("status").returncode == 1


def test_the_form_of_kubernetes(hosts: RayHosts) -> None:
    """As the chart's RayCluster: the controller starts no router, instances go to the node that has the resource of
    their group, and a router that is started elsewhere announces itself."""
    engine = {"kv_memory": "64MiB", "threads": 1, "dtype": "float32"}
    kind = {"engine": engine, "ray_resources": {"tandem-group": 1}}
    common = {"model": str(MODEL), "cluster_token": f"file:{hosts.folder / 'token'}"}
    settings = {"start_router": False, "controller": "127.0.0.1:8003", "prefill": kind, "decode": kind}
    section = {"http": "127.0.0.1:8000", "grpc": "127.0.0.1:8001", "control": "0.0.0.0:8002"}
    router = {"router": section, "controller": f"{ADDRESS_A}:8003", "advertise": ADDRESS_A}
    files = {}
    for name, content in (("settings", settings), ("router", router)):
        files[name] = hosts.folder / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(common | content))
    up = hosts.tandem("up", str(files["settings"]), "--ray", HEAD, "--no-wait")
    assert up.returncode == 0, up.stdout + up.stderr
    command = [sys.executable, "-m", "tandem.cli.main", "router", str(files["router"]), "--grace", "1"]
    with (hosts.folder / "router.log").open("wb") as log:
        process = subprocess.Popen(command, env=hosts.environment, stdout=log, stderr=log)
    served = Served(hosts)
    try:
        served.wait_instances({ADDRESS_B: ["decode-0", "prefill-0"]})
        served.try_all_pairs()
        assert [each["name"] for each in hosts.status()["cluster"]["processes"]] == ["prefill-0", "decode-0"]
    finally:
        process.terminate()
        process.wait(30)
        down = hosts.tandem("down")
    assert down.returncode == 0, down.stdout + down.stderr
    assert no_workers_left(hosts.folder)


def test_an_instance_that_no_node_has_room_for_is_on_two(hosts: RayHosts) -> None:
    """Three ranks of two cores each: two of them fit on host a, and one on host b."""
    file = hosts.folder / "large.yaml"
    engine = {"kv_memory": "64MiB", "dtype": "float32", "threads": 6, "pp": 3}
    file.write_text(yaml.safe_dump({"model": str(MODEL), "colocated": {"engine": engine}}))
    process, output = serve(hosts, str(file))
    served = Served(hosts)
    prompt_ids, wanted = reference()
    try:
        wait_for(process, output, r"^Ctrl-C ends it\.$")
        (host,) = served.by_host()
        assert host == ADDRESS_A, "it is the node with most room"
        assert hosts.followers() == {ADDRESS_A: 1, ADDRESS_B: 1}
        assert asyncio.run(served.greedy_answers(prompt_ids)) == wanted
        (before,) = (status.instance_id for status in served.instances())
        hosts.kill_b()
        wait_for(process, output, r"colocated-0: .*10\.77\.0\.2 of the instance has ended")
        served.wait_instances({})
        hosts.start_b()
        served.wait_instances({ADDRESS_A: ["colocated-0"]})
        assert {status.instance_id for status in served.instances()} != {before}
        assert asyncio.run(served.greedy_answers(prompt_ids)) == wanted
    finally:
        process.terminate()
        process.wait(60)
    assert process.returncode == 0, output.read_text()
    assert no_workers_left(hosts.folder)


def test_a_plan_with_an_instance_on_two_nodes(hosts: RayHosts) -> None:
    """First both stages of prefill are on one node, as one plan says, then on two, as another one says."""
    prompt_ids, wanted = reference()
    one = plan_file(hosts.folder, pp=2, prefill=[["x:0", "x:1"]], decode=[["y:0"]])
    process, output = serve(hosts, str(one), *SMALL)
    served = Served(hosts)
    try:
        wait_for(process, output, r"^Ctrl-C ends it\.$")
        host_of = {name: host for host, (name,) in served.by_host().items()}
        x, y = host_of["prefill-0"], host_of["decode-0"]
        assert {x, y} == {ADDRESS_A, ADDRESS_B}
        assert hosts.followers() == {x: 1, y: 0}
        assert asyncio.run(served.greedy_answers(prompt_ids)) == wanted

        two = plan_file(hosts.folder, pp=2, prefill=[["x:0", "y:0"]], decode=[["y:1"]])
        applied = hosts.tandem("apply", str(two), *SMALL)
        assert applied.returncode == 0, applied.stdout + applied.stderr
        assert "prefill-0 goes where the plan has it" in applied.stdout
        assert "decode-0 goes" not in applied.stdout
        assert served.by_host() == {x: ["prefill-0"], y: ["decode-0"]}
        assert hosts.followers() == {x: 0, y: 1}
        assert asyncio.run(served.greedy_answers(prompt_ids)) == wanted
        assert served.transports() == {(False, "gloo")}

        hosts.kill_b()
        served.wait_instances({ADDRESS_A: ["decode-0", "prefill-0"]})
        assert asyncio.run(served.greedy_answers(prompt_ids)) == wanted
        hosts.start_b()
        applied = hosts.tandem("apply", str(two), *SMALL)
        assert applied.returncode == 0, applied.stdout + applied.stderr
        assert sorted(hosts.followers().values()) == [0, 1]
        assert len(served.by_host()) == 2
        assert asyncio.run(served.greedy_answers(prompt_ids)) == wanted
    finally:
        process.terminate()
        process.wait(60)
    assert process.returncode == 0, output.read_text()
    assert no_workers_left(hosts.folder)
