import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from tandem.core.address import advertised
from tandem.core.config import RouterConfig, ServeConfig, WorkerConfig
from tandem.core.config_file import apply_overrides, dump_config, load_config
from tandem.core.errors import ConfigError
from tandem.core.router_section import RouterSection


class AnyValue(BaseModel):
    value: Any


MISTAKES = {
    "unknown setting": (
        "model: m\n\ndecode:\n  engine:\n    thread: 2\n",
        "FILE line 5: decode.engine.thread is not a setting; did you mean threads?",
    ),
    "setting in the wrong section": (
        "model: m\nthreads: 2\n",
        "FILE line 2: threads is not a setting; did you mean prefill.engine.threads or "
        "decode.engine.threads or colocated.engine.threads?",
    ),
    "nothing like it": (
        "model: m\nrouter:\n  colour: red\n",
        "FILE line 3: router.colour is not a setting; the settings here are http, grpc, control, request_timeout_s, "
        "max_queue, outstanding_steps, max_outstanding_tokens, max_wait_s, policy, queue_order, slo, tls, api_keys, "
        "allow_anonymous, open_metrics, share_prefixes, max_body, max_bodies, max_body_items, max_header, "
        "max_connections, max_client_connections, max_client_choices, max_response_logprobs, header_timeout_s, "
        "body_timeout_s, idle_timeout_s, write_timeout_s, cors_origins, allowed_hosts, reflection, "
        "generation_config, parse_control_tokens, resume, replacement_wait_s, profile_window_s, tracing, "
        "vllm_metrics, ui, plan",
    ),
    "prefill without decode": (
        "model: m\nprefill: {}\ndecode: []\n",
        "FILE line 3: decode: is empty, and prefill has instances, which need it; add an instance, or empty both",
    ),
    "less for all bodies than for one": (
        "model: m\nrouter:\n  max_body: 2MiB\n  max_bodies: 1MiB\n",
        "FILE line 4: router.max_bodies: is 1048576, less than max_body, 2097152",
    ),
    "wrong type": (
        "model: m\nprefill:\n  instances: two\n",
        "FILE line 3: prefill.instances must be a whole number, not 'two'",
    ),
    "fraction": (
        "model: m\nprefill:\n  instances: 1.5\n",
        "FILE line 3: prefill.instances must be a whole number, not 1.5",
    ),
    "not a number": (
        "model: m\nrouter: {request_timeout_s: soon}\n",
        "FILE line 2: router.request_timeout_s must be a number, not 'soon'",
    ),
    "too small": (
        "model: m\ndecode:\n  instances: 0\n",
        "FILE line 3: decode.instances must be at least 1, not 0",
    ),
    "too large": (
        "model: m\ndecode:\n  engine:\n    block_size: 1000\n",
        "FILE line 4: decode.engine.block_size must be at most 256, not 1000",
    ),
    "not positive": (
        "model: m\nprefill:\n  lease_s: -1\n",
        "FILE line 3: prefill.lease_s must be more than 0, not -1",
    ),
    "unknown choice": (
        "model: m\ndecode:\n  transport: rdma\n",
        "FILE line 3: decode.transport must be one of auto, shared_memory, gloo or nccl, not 'rdma'",
    ),
    "bad size": (
        "model: m\nprefill:\n  engine:\n    kv_memory: plenty\n",
        "FILE line 4: prefill.engine.kv_memory must be a whole number or a size like 512MiB, not 'plenty'",
    ),
    "bad address": (
        "model: m\nrouter:\n  http: localhost\n",
        "FILE line 3: router.http: 'localhost' is not an address of the form host:port",
    ),
    "not a boolean": (
        "model: m\nprefill:\n  prefix_cache: perhaps\n",
        "FILE line 3: prefill.prefix_cache must be true or false, not 'perhaps'",
    ),
    "number where text belongs": (
        "model: m\ncluster_token: 1234\n",
        "FILE line 2: cluster_token must be text, not 1234; put it in quotes",
    ),
    "empty section": (
        "model: m\nprefill:\ndecode:\n  instances: 2\n",
        "FILE line 2: prefill is a section, not empty; give it settings of its own, e.g. prefill.instances, "
        "or remove it",
    ),
    "missing": ("prefill:\n  instances: 1\n", "FILE line 1: model is missing; add it"),
    "key that is no text": (
        "model: m\n1: 2\n",
        "FILE line 2: 1 cannot be the name of a setting; names are text",
    ),
    "duplicate": (
        "model: m\nprefill:\n  instances: 1\n  instances: 2\n",
        "FILE line 4: prefill.instances is set twice",
    ),
    "two mistakes": (
        "model: m\nprefil:\n  instances: 1\ndecode:\n  max_batch: 0\n",
        "FILE line 5: decode.max_batch must be at least 1, not 0\n"
        "FILE line 2: prefil is not a setting; did you mean prefill?",
    ),
    "not a mapping": ("- a\n- b\n", "FILE must hold settings of the form 'name: value', one on each line"),
    "just text": ("hello\n", "FILE must hold settings of the form 'name: value', one on each line"),
    "empty": ("", "FILE is empty; it must name at least: model"),
    "only comments": ("# nothing\n", "FILE is empty; it must name at least: model"),
    "tab": ("model: m\nprefill:\n\tinstances: 1\n", "FILE line 3: begins with a tab; YAML is indented with spaces"),
    "two documents": ("model: m\n---\nmodel: n\n", "FILE line 2: begins a second document ('---'); keep one document"),
    "tag": ("model: !!python/name:os.system x\n", "FILE line 1: YAML tags ('!...') are not allowed"),
    "unclosed bracket": (
        "model: [m\n",
        "FILE line 2: is not valid YAML (expected ',' or ']', but got '<stream end>')",
    ),
    "control character": ("model: m\nmodel_name: a\x00b\n", "FILE line 2: holds a character that YAML does not allow"),
    "endless nesting": ("[" * 5000, "FILE line 1: is nested too deeply"),
    "tag that does not fit": (
        "model: m\nrouter: {max_queue: !!int [1]}\n",
        "FILE line 2: YAML tags ('!...') are not allowed",
    ),
    "not finite": (
        "model: m\nrouter: {request_timeout_s: .nan}\n",
        "FILE line 2: router.request_timeout_s must be a finite number, not nan",
    ),
    "endless": ("model: m\nload_timeout_s: 1e999\n", "FILE line 2: load_timeout_s must be a finite number, not inf"),
    "too many digits": (
        f"model: m\ndecode: {{max_queue: {'9' * 30}}}\n",
        "FILE line 2: has a number with too many digits; put text in quotes",
    ),
    "size beyond all machines": (
        "model: m\ndecode: {engine: {kv_memory: 9999999999GiB}}\n",
        "FILE line 2: decode.engine.kv_memory must be at most 1152921504606846976, not '9999999999GiB'",
    ),
    "size of hundreds of digits": (
        f"model: m\ndecode: {{engine: {{kv_memory: {'9' * 400}GB}}}}\n",
        "FILE line 2: decode.engine.kv_memory must be a whole number or a size like 512MiB, not '" + "9" * 56 + "...",
    ),
    "more instances than fit anywhere": (
        "model: m\ndecode: {instances: 1000000000}\n",
        "FILE line 2: decode.instances must be at most 10000, not 1000000000",
    ),
    "more than a message holds": (
        "model: m\ndecode: {max_batch: 9223372036854775807}\n",
        "FILE line 2: decode.max_batch must be at most 2147483647, not 9223372036854775807",
    ),
    "negative time": (
        "model: m\ndecode: {step_cost: [-1, 0, 0, 0, 0, 0]}\n",
        "FILE line 2: decode.step_cost.0 must be at least 0, not -1",
    ),
    "NUL in a path": (
        'model: "a\\0b"\nrouter: {api_keys: "file:a\\0b"}\n',
        "FILE line 1: model: a\\x00b is not the path of a file or folder\n"
        "FILE line 2: router.api_keys: a\\x00b is not the path of a file",
    ),
    "impossible date": ("model: 2026-13-99\n", "FILE: month must be in 1..12; put text in quotes"),
}


@pytest.mark.parametrize(("text", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_each_mistake_is_told_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, ServeConfig)
    assert caught.value.message == sentence.replace("FILE", str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist$"):
        load_config(tmp_path / "none.yaml", ServeConfig)
    with pytest.raises(ConfigError, match="is a folder; give the path of a configuration file"):
        load_config(tmp_path, ServeConfig)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("model: m\nmodel_name: café\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml line 2: is not UTF-8 text"):
        load_config(latin, ServeConfig)
    with pytest.raises(ConfigError, match="larger than 256 KiB"):
        load_config(Path("/dev/zero"), ServeConfig)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.yaml"
    path.write_text("model: m\n")
    path.chmod(0)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path, ServeConfig)


def test_an_alias_loop_ends(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text("model: m\nprefill: &a\n  engine: *a\n")
    with pytest.raises(ConfigError, match=r"aliases .* for themselves"):
        load_config(path, ServeConfig)


def test_sections_may_be_shared_by_alias(tmp_path: Path) -> None:
    path = tmp_path / "alias.yaml"
    path.write_text("model: m\nprefill: {engine: &e {threads: 3}}\ndecode: {engine: {<<: *e, kv_memory: 1GiB}}\n")
    config = load_config(path, ServeConfig)
    assert config.prefill[0].engine.threads == config.decode[0].engine.threads == 3
    assert config.decode[0].engine.kv_memory == 1 << 30


def test_model_paths_count_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "conf" / "serve.yaml"
    path.parent.mkdir()
    path.write_text("model: ../models/x\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("conf/serve.yaml"), ServeConfig).model == (tmp_path / "models" / "x").resolve()
    path.write_text("model: /abs/x\n")
    assert load_config(path, ServeConfig).model == Path("/abs/x")
    monkeypatch.setenv("HOME", str(tmp_path))
    path.write_text("model: ~/x\n")
    assert load_config(path, ServeConfig).model == (tmp_path / "x").resolve()


def test_byte_order_mark_and_utf8_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_bytes("\ufeffmodel: m\nmodel_name: café\n".encode())
    assert load_config(path, ServeConfig).model_name == "café"


def test_mistakes_in_lists_have_their_line(tmp_path: Path) -> None:
    path = tmp_path / "worker.yaml"
    path.write_text("model: m\nrouters:\n  - 127.0.0.1:1\n  - nowhere\n")
    with pytest.raises(ConfigError, match=r"line 4: routers\.1: 'nowhere' is not an address"):
        load_config(path, WorkerConfig)


@given(
    instances=st.integers(1, 100),
    kv_memory=st.integers(1, 1 << 40),
    lease_s=st.floats(0.001, 1e6),
    name=st.one_of(
        st.none(), st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=20)
    ),
    token=st.sampled_from([None, "yes", "0123", "1:30", "null", "a: b", "# x", "2026-01-01", "1e3"]),
)
def test_what_is_dumped_loads_again(
    tmp_path_factory: pytest.TempPathFactory,
    instances: int,
    kv_memory: int,
    lease_s: float,
    name: str | None,
    token: str | None,
) -> None:
    config = ServeConfig.model_validate(
        {
            "model": "/models/x",
            "model_name": name,
            "prefill": {"instances": instances, "engine": {"kv_memory": kv_memory}, "lease_s": lease_s},
            "cluster_token": token,
        }
    )
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path, ServeConfig) == config


def test_worker_and_router_files_load_again(tmp_path: Path) -> None:
    worker = WorkerConfig(model=Path("/m"), routers=("127.0.0.1:1", "[::1]:2"), cluster_token="s")
    router = RouterConfig(model=Path("/m"), heartbeat_timeout_s=1.5)
    path = tmp_path / "x.yaml"
    path.write_text(dump_config(worker))
    assert load_config(path, WorkerConfig) == worker
    path.write_text(dump_config(router))
    assert load_config(path, RouterConfig) == router


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "10.0.0.1:9", "worker-3:9", "localhost.example:9"])
@pytest.mark.parametrize("token", ["", "cluster_token: ''\n"])
def test_an_internal_port_that_others_reach_needs_the_cluster_token(address: str, token: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for kind, text, setting in (
        (WorkerConfig, f"model: /m\nlisten: '{address}'\n", "listen"),
        (RouterConfig, f"model: /m\nrouter: {{control: '{address}'}}\n", "router.control"),
    ):
        path.write_text(text + token)
        with pytest.raises(ConfigError) as caught:
            load_config(path, kind)
        assert caught.value.message.startswith(f"{path} line 2: {setting}: {address} can be reached from other")
        assert "set cluster_token" in caught.value.message
        path.write_text(text + "cluster_token: s\nadvertise: host-1\n")
        load_config(path, kind)


@pytest.mark.parametrize("setting", ["http", "grpc"])
def test_a_public_port_that_others_reach_needs_to_know_its_clients(setting: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for kind in (ServeConfig, RouterConfig):
        text = f"model: /m\nrouter:\n  {setting}: 0.0.0.0:8000\n"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config(path, kind)
        assert caught.value.message.startswith(f"{path} line 3: router.{setting}: 0.0.0.0:8000 can be reached from")
        for known in (
            "api_keys: env:KEYS",
            "tls: {certificate: c, key: k, client_ca: ca}",
            "allow_anonymous: true",
        ):
            path.write_text(f"{text}  {known}\n")
            load_config(path, kind)
        path.write_text(f"{text}  tls: {{certificate: c, key: k}}\n")
        with pytest.raises(ConfigError, match="everybody there would be served"):
            load_config(path, kind)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_listening_on_all_interfaces_needs_an_advertised_host(host: str) -> None:
    with pytest.raises(ValueError, match="others cannot connect to"):
        WorkerConfig(model=Path("/m"), listen=f"{host}:9", cluster_token="s")
    router = RouterSection(control=f"{host}:9")
    RouterConfig(model=Path("/m"), router=router, cluster_token="s")  # it tells nobody
    with pytest.raises(ValueError, match="instances cannot connect to"):
        RouterConfig(model=Path("/m"), router=router, cluster_token="s", controller="10.0.0.1:1")


def test_the_address_that_others_get() -> None:
    assert advertised("0.0.0.0:9", "host-1") == "host-1:9"
    assert advertised("[::]:9", "fd00::1") == "[fd00::1]:9"
    assert advertised("10.0.0.1:9", None) == "10.0.0.1:9"


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.1.2.3:9", "[::1]:0", "localhost:9"])
def test_a_port_of_this_machine_alone_needs_none(address: str) -> None:
    WorkerConfig(model=Path("/m"), listen=address)
    RouterConfig(model=Path("/m"), router=RouterSection(control=address))


def test_overrides_replace_settings() -> None:
    config = ServeConfig(model=Path("/m"))
    changed = apply_overrides(
        config, ["router.http=127.0.0.1:9000", "prefill.instances=2", "decode.engine.kv_memory=1GiB", "model_name=x=y"]
    )
    assert changed.router.http == "127.0.0.1:9000"
    assert changed.prefill[0].instances == 2
    assert changed.decode[0].engine.kv_memory == 1 << 30
    assert changed.model_name == "x=y"
    assert changed.router.grpc == config.router.grpc
    assert config.prefill[0].instances == 1
    assert apply_overrides(changed, ["prefill.prefix_cache=false"]).router.http == "127.0.0.1:9000"


def test_paths_of_overrides_count_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changed = apply_overrides(
        RouterConfig(model=Path("/m")), ["model=models/x", "router.api_keys=file:keys.yaml", "cluster_token=file:t"]
    )
    assert changed.model == (tmp_path / "models" / "x").resolve()
    assert (changed.router.api_keys, changed.cluster_token) == (f"file:{tmp_path}/keys.yaml", f"file:{tmp_path}/t")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("prefill.instance=2", "--set prefill.instance=2: prefill.instance is not a setting; did you mean instances?"),
        ("decode.max_batch=0", "--set decode.max_batch=0: decode.max_batch must be at least 1, not 0"),
        ("nonsense", "--set nonsense: must have the form setting=value, e.g. router.http=127.0.0.1:9000"),
        ("router..http=1", "--set router..http=1: must have the form setting=value, e.g. router.http=127.0.0.1:9000"),
        (
            "prefill=3",
            "--set prefill=3: prefill is a section, not 3; give it settings of its own, e.g. prefill.instances, "
            "or remove it",
        ),
        ("model.x=3", "--set model.x=3: model must be the path of a file or folder, not a section"),
        (
            "decode.transport=[",
            "--set decode.transport=[: decode.transport must be one of auto, shared_memory, gloo or nccl, not '['",
        ),
    ],
)
def test_wrong_overrides_are_told_in_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(ServeConfig(model=Path("/m")), [override])
    assert caught.value.message == sentence


def test_a_role_may_have_several_kinds(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        "model: m\nprefill:\n  - {instances: 2}\n  - {max_batch_tokens: 64}\ncolocated: {policy: prompt_first}\n"
    )
    config = load_config(path, ServeConfig)
    assert [(role, section.instances) for role, section in config.kinds] == [
        ("prefill", 2),
        ("prefill", 1),
        ("decode", 1),
        ("colocated", 1),
    ]
    changed = apply_overrides(config, ["prefill.1.instances=3", "colocated.max_batch=2"])
    assert [section.instances for section in changed.prefill] == [2, 3]
    assert changed.colocated[0].max_batch == 2
    path.write_text(dump_config(changed))
    assert load_config(path, ServeConfig) == changed
    with pytest.raises(ConfigError, match=r"prefill is a list; name one of its 2 items, e.g. prefill.0"):
        apply_overrides(config, ["prefill.instances=3"])


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("model: m\n", ["prefill", "decode"]),
        ("model: m\ndecode: {instances: 2}\n", ["prefill", "decode"]),
        ("model: m\ncolocated: {}\n", ["colocated"]),
    ],
)
def test_prefill_and_decode_go_together(tmp_path: Path, text: str, roles: list[str]) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    assert [role for role, _ in load_config(path, ServeConfig).kinds] == roles


def test_instances_that_cannot_exchange_kv_are_refused_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("model: m\ndecode:\n  engine:\n    dtype: bfloat16\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ServeConfig)
    assert "line 4: decode.engine.dtype: is bfloat16, and prefill has auto" in caught.value.message.splitlines()[-1]


def test_instances_of_other_shapes_and_block_sizes_exchange_kv(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("model: m\nprefill:\n  engine: {pp: 2, block_size: 32}\ndecode:\n  engine: {tp: 2}\n")
    (_, prefill), (_, decode) = load_config(path, ServeConfig).kinds
    assert (str(prefill.engine.shape), str(decode.engine.shape)) == ("tp1pp2", "tp2")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e1", 10.0),
        ("5E-1", 0.5),
        ("+12e03", 12000.0),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("-.5e+1", -5.0),
        ("3.", 3.0),
        ("-.inf", -math.inf),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 17),
        ("+7", 7),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("1e", "1e"),
    ],
)
def test_numbers_are_read_in_every_form_of_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text(f"value: {text}\n")
    read = load_config(path, AnyValue).value
    assert (type(read), read) == (type(value), value)
    assert apply_overrides(AnyValue(value=None), [f"value={text}"]).value == value


@pytest.mark.parametrize("text", ["1e1", "017", "12:30", "0o17", ".5", "yes", "1_000"])
def test_text_that_looks_like_a_number_is_written_as_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "text.yaml"
    path.write_text(dump_config(AnyValue(value=text)))
    assert load_config(path, AnyValue).value == text


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"ranks": {"listen": "10.0.0.1:80", "per_host": [1, 2]}}, "ranks.per_host: has 3 ranks, and an instance of"),
        ({"ranks": {"listen": "0.0.0.0:80", "per_host": [1, 1]}}, "ranks.listen: is 0.0.0.0:80; other hosts connect"),
        ({"ranks": {"listen": "10.0.0.1:0", "per_host": [1, 1]}}, "ranks.listen: is 10.0.0.1:0"),
        ({"ranks": {"listen": "10.0.0.1:80", "per_host": [2]}}, "ranks.per_host"),
        ({"cluster_token": None}, "ranks.listen: 10.0.0.1:80 can be reached"),
        ({"instance": {"engine": {"pp": 2}, "transport": "shared_memory"}}, "instance.transport: is shared_memory"),
    ],
)
def test_ranks_of_several_hosts_are_refused_where_they_cannot_meet(
    changed: dict[str, object], named: str, tmp_path: Path
) -> None:
    settings: dict[str, object] = {
        "model": "/m",
        "cluster_token": "s",
        "instance": {"engine": {"pp": 2}},
        "ranks": {"listen": "10.0.0.1:80", "per_host": [1, 1]},
    }
    path = tmp_path / "worker.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert load_config(path, WorkerConfig).ranks is not None
    path.write_text(yaml.safe_dump(settings | changed))
    with pytest.raises(ConfigError, match=re.escape(named)):
        load_config(path, WorkerConfig)
