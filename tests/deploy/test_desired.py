import json
from pathlib import Path

import pytest

from tandem.core.config import ServeConfig, WorkerConfig
from tandem.core.errors import ConfigError
from tandem.core.instance_section import InstanceSection
from tandem.core.plan import Plan, PlanGroup
from tandem.core.router_section import RouterSection
from tandem.deploy.desired import Desired
from tandem.deploy.topology import Machine

MACHINE = Machine(cores=12)
CONFIG = ServeConfig(
    model=Path("/m"),
    router=RouterSection(http="127.0.0.1:5", grpc="127.0.0.1:6", control="127.0.0.1:7"),
    prefill=(InstanceSection(instances=2),),
    decode=(InstanceSection(),),
    cluster_token="secret",
)
PLAN = Plan(
    model="m",
    verdict="colocate",
    groups=(PlanGroup(role="colocated", instances=1, device="cpu", kv_tokens=100),),
)
DESIRED = Desired(CONFIG, 3.0, frozenset({"prefill-1"}), {"decode-0": "colocated"})


def names(desired: Desired) -> list[str]:
    return [spec.name for spec in desired.processes(MACHINE)]


def test_what_an_operator_has_changed() -> None:
    assert names(DESIRED) == ["router-0", "prefill-0", "decode-0"]
    config = DESIRED.processes(MACHINE)[2].config
    assert isinstance(config, WorkerConfig)
    assert (config.role, config.name) == ("colocated", "decode-0")
    assert names(DESIRED.with_drained("prefill-1", undo=True)) == ["router-0", "prefill-0", "prefill-1", "decode-0"]
    for name, undo, text in (("prefill-1", False, "prefill-1 is already drained"), ("x-0", True, "x-0 is not drained")):
        with pytest.raises(ConfigError, match=text):
            DESIRED.with_drained(name, undo=undo)


def test_a_plan_leaves_what_it_does_not_speak_of() -> None:
    section = RouterSection(control="127.0.0.1:7", max_queue=5, slo=())
    running = CONFIG.model_copy(
        update={
            "router": section,
            "start_router": False,
            "model_name": "chat",
            "model_hash": "0123456789",
            "load_timeout_s": 7.0,
        }
    )
    planned = ServeConfig.model_validate(
        {"model": "/m", "router": {"slo": [{"name": "a", "ttft_s": 1.0, "tpot_s": 0.1}]}, "colocated": {}}
    )
    changed = Desired(running).with_config(planned, PLAN).config
    assert (changed.start_router, changed.model_name, changed.model_hash, changed.load_timeout_s) == (
        False,
        "chat",
        "0123456789",
        7.0,
    )
    assert (changed.router.max_queue, [each.name for each in changed.router.slo]) == (5, ["a"])
    settings = Desired(running).with_config(planned).config
    assert (settings.start_router, settings.model_name, settings.model_hash) == (False, "chat", None)
    assert settings.router.max_queue == RouterSection().max_queue, "a serve file speaks of it"


def test_it_is_the_same_after_a_restart() -> None:
    written = json.dumps(DESIRED.to_json())
    assert Desired.from_json(json.loads(written)) == DESIRED


def test_what_a_newer_version_has_written_is_read_without_what_it_alone_knows(caplog: pytest.LogCaptureFixture) -> None:
    desired = DESIRED.with_config(CONFIG, PLAN)
    written = json.loads(json.dumps(desired.to_json()))
    written["config"]["colour"] = "red"
    written["config"]["router"]["tracing"]["colour"] = {"a": 1}
    written["config"]["prefill"]["engine"]["colour"] = 7
    written["plan"]["groups"][0]["colour"] = None
    assert Desired.from_json(written) == desired
    assert "left out: router.tracing.colour, prefill.engine.colour, colour" in caplog.text
    assert "left out: groups.0.colour" in caplog.text
    written["config"]["router"]["max_queue"] = "many"
    with pytest.raises(ValueError, match="max_queue"):
        Desired.from_json(written)
    del written["config"]["router"]["max_queue"]
    assert Desired.from_json(written) == desired, "an older version knew fewer settings"


def test_new_settings_keep_addresses_token_and_drained_processes() -> None:
    new = ServeConfig.model_validate({"model": "/m", "router": {"http": "127.0.0.1:9", "grpc": "127.0.0.1:0"}})
    changed = DESIRED.with_config(new)
    router = changed.config.router
    assert (router.http, router.grpc, router.control) == ("127.0.0.1:9", "127.0.0.1:6", "127.0.0.1:7")
    assert (changed.config.cluster_token, changed.grace_s) == ("secret", 3.0)
    assert (changed.drained, changed.roles) == (frozenset({"prefill-1"}), {})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"model": "/other"}, "the cluster serves m, and these settings are for other"),
        ({"model": "/m", "cluster_token": "x"}, "the cluster_token of a running cluster cannot change"),
    ],
)
def test_what_a_running_cluster_cannot_change(settings: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        DESIRED.with_config(ServeConfig.model_validate(settings))


def test_numbers_of_instances() -> None:
    assert names(DESIRED.with_instances({"decode": 2})) == ["router-0", "prefill-0", "decode-0", "decode-1"]
    with pytest.raises(ConfigError, match="no colocated instances"):
        DESIRED.with_instances({"colocated": 1})
    with pytest.raises(ConfigError, match="at least 1 decode instance, not 0"):
        DESIRED.with_instances({"decode": 0})


def test_a_share_of_the_cores_is_no_other_setting() -> None:
    """More instances have fewer cores each; those that run keep theirs."""
    before, after = (
        {spec.name: spec for spec in desired.processes(MACHINE)}
        for desired in (DESIRED, DESIRED.with_instances({"decode": 3}))
    )
    assert before["decode-0"] != after["decode-0"]
    assert before["decode-0"].can_become(after["decode-0"])
    engine = CONFIG.decode[0].engine.model_copy(update={"threads": 2})
    decode = (CONFIG.decode[0].model_copy(update={"engine": engine}),)
    fixed = DESIRED.with_config(CONFIG.model_copy(update={"decode": decode}))
    assert not before["decode-0"].can_become({spec.name: spec for spec in fixed.processes(MACHINE)}["decode-0"])


def test_a_process_of_the_other_role_is_used_again() -> None:
    """Bounds of steps may differ, memory may not; and there and back again."""
    pairs = CONFIG.model_copy(update={"decode": (InstanceSection(instances=2, max_batch=7, max_batch_tokens=640),)})
    decode = InstanceSection(instances=3, max_batch=7, max_batch_tokens=640)
    more_decode = pairs.model_copy(update={"prefill": (InstanceSection(),), "decode": (decode,)})
    before = Desired(pairs)
    after = before.with_config(more_decode).reusing(before, MACHINE)
    assert names(after) == ["router-0", "prefill-0", "decode-0", "decode-1", "prefill-1"]
    old, new = before.processes(MACHINE)[2], after.processes(MACHINE)[4]
    assert isinstance(new.config, WorkerConfig)
    assert (new.name, new.config.name, new.config.role) == ("prefill-1", "prefill-1", "decode")
    assert new.config.instance.max_batch_tokens == 640
    assert old.can_become(new)
    assert Desired.from_json(json.loads(json.dumps(after.to_json()))) == after

    back = after.with_config(pairs).reusing(after, MACHINE)
    assert back.processes(MACHINE) == before.processes(MACHINE)
    fewer = after.with_instances({"decode": 2}).reusing(after, MACHINE)
    assert names(fewer) == ["router-0", "prefill-0", "decode-0", "decode-1"]
    both = after.with_instances({"prefill": 2}).reusing(after, MACHINE)
    assert names(both) == ["router-0", "prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"]

    other_memory = decode.model_copy(update={"engine": decode.engine.model_copy(update={"kv_memory": 1 << 20})})
    changed = more_decode.model_copy(update={"decode": (other_memory,)})
    assert "decode-2" in names(before.with_config(changed).reusing(before, MACHINE))
