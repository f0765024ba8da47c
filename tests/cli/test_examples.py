"""The examples' files load, and the one with every setting really has every setting, at its default."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from tandem.cli import schema
from tandem.core.api_keys import ApiKeyFile
from tandem.core.config import RouterConfig, ServeConfig, WorkerConfig
from tandem.core.config_file import dump_config, load_config
from tandem.core.parallel import ParallelShape
from tandem.core.plan import Plan
from tandem.core.slo_file import SloFile
from tandem.deploy.plan_serving import serve_config_of
from tandem.deploy.topology import Machine, plan_processes
from tandem.placement.cluster import Cluster
from tandem.placement.costs.models import model_shape
from tandem.placement.costs.sources import cost_source_of
from tandem.placement.workload.streams import make_stream

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
KINDS: dict[str, type[BaseModel]] = {
    "serve.yaml": ServeConfig,
    "laptop-2p2d.yaml": ServeConfig,
    "prefill_worker.yaml": WorkerConfig,
    "decode_worker.yaml": WorkerConfig,
    "router.yaml": RouterConfig,
    "api_keys.yaml": ApiKeyFile,
    "slo-laptop.yaml": SloFile,
    "slo-h100.yaml": SloFile,
    "slo-a100.yaml": SloFile,
    "slo-mixed.yaml": SloFile,
    "slo-populations.yaml": SloFile,
    "plan-colocated.yaml": Plan,
    "plan-prompt-first.yaml": Plan,
    "plan-ranks.yaml": Plan,
    "plan-stages.yaml": Plan,
    "plan-mixed.yaml": Plan,
    "plan-shapes.yaml": Plan,
}
TINY = EXAMPLES.parent / "models" / "tiny-python"
SLO_FILES = [name for name, kind in KINDS.items() if kind is SloFile]


def test_every_file_has_a_kind() -> None:
    assert {path.name for path in EXAMPLES.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_it_loads(name: str) -> None:
    config = load_config(EXAMPLES / name, KINDS[name])
    if KINDS[name] not in (SloFile, ApiKeyFile):
        assert Path(getattr(config, "model", "")) == TINY


@pytest.mark.parametrize("name", SLO_FILES)
def test_a_planner_can_begin_with_an_slo_file(name: str) -> None:
    slo = load_config(EXAMPLES / name, SloFile)
    model = model_shape(slo.model)
    cluster, source = Cluster.of(slo.cluster), cost_source_of(slo, model)
    shapes = [ParallelShape(tp) for tp in (1, 2, 4, 8) if tp <= slo.search.max_tp]
    assert any(source.kv_tokens(device, shape) for device in cluster.devices for shape in shapes)
    requests = make_stream(slo.workload, slo.slo, count=200, rate=1.0, seed=slo.search.seed)
    assert int((requests.prompt_tokens + requests.output_tokens).max()) <= model.max_context_tokens


@pytest.mark.parametrize("kind", schema.KINDS)
def test_the_schemas_are_those_of_the_code(kind: str) -> None:
    committed = (EXAMPLES / "schema" / f"{kind}.json").read_text()
    assert committed == schema.schema_of(kind) + "\n", f"run: tandem schema {kind} > examples/schema/{kind}.json"


@pytest.mark.parametrize("name", SLO_FILES)
def test_an_editor_finds_the_schema(name: str) -> None:
    first_line = (EXAMPLES / name).read_text().splitlines()[0]
    assert (EXAMPLES / first_line.removeprefix("# yaml-language-server: $schema=")).is_file()


def test_serve_yaml_has_every_setting_at_its_default() -> None:
    path = EXAMPLES / "serve.yaml"
    shown = load_config(path, ServeConfig)
    assert shown == ServeConfig(model=shown.model)
    assert _names(yaml.safe_load(path.read_text())) == _names(yaml.safe_load(dump_config(shown)))


def test_by_hand_means_the_same_secret_and_control_address() -> None:
    router = load_config(EXAMPLES / "router.yaml", RouterConfig)
    for role in ("prefill", "decode"):
        worker = load_config(EXAMPLES / f"{role}_worker.yaml", WorkerConfig)
        assert worker.role == role, "`tandem worker` does not know it otherwise"
        assert worker.routers == (router.router.control,)
        assert worker.cluster_token == router.cluster_token


def test_two_and_two() -> None:
    config = load_config(EXAMPLES / "laptop-2p2d.yaml", ServeConfig).model_copy(update={"cluster_token": "t"})
    names = [spec.name for spec in plan_processes(config, Machine(cores=2))]
    assert names == ["router-0", "prefill-0", "prefill-1", "decode-0", "decode-1"]


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("plan-colocated.yaml", ["colocated", "colocated"]),
        ("plan-prompt-first.yaml", ["colocated"]),
        ("plan-ranks.yaml", ["colocated"]),
        ("plan-stages.yaml", ["colocated"]),
        ("plan-mixed.yaml", ["prefill", "decode", "decode", "colocated"]),
        ("plan-shapes.yaml", ["prefill", "decode", "decode"]),
    ],
)
def test_every_plan_becomes_processes(name: str, roles: list[str]) -> None:
    config = serve_config_of(load_config(EXAMPLES / name, Plan), Machine(cores=2))
    specs = plan_processes(config.model_copy(update={"cluster_token": "t"}), Machine(cores=2))
    assert [spec.role.value for spec in specs] == ["router", *roles]


def _names(value: object, prefix: str = "") -> set[str]:
    """Paths of all settings."""
    if not isinstance(value, dict):
        return {prefix}
    return {name for key, below in value.items() for name in _names(below, f"{prefix}.{key}")}
