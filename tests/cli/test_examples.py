"""The examples' files load, and the one with every setting really has every setting, at its default."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from core.config import RouterConfig, ServeConfig, WorkerConfig
from core.config_file import dump_config, load_config
from deploy.topology import Machine, plan_processes

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
KINDS: dict[str, type[BaseModel]] = {
    "serve.yaml": ServeConfig,
    "laptop-2p2d.yaml": ServeConfig,
    "prefill_worker.yaml": WorkerConfig,
    "decode_worker.yaml": WorkerConfig,
    "router.yaml": RouterConfig,
}


def test_every_file_has_a_kind() -> None:
    assert {path.name for path in EXAMPLES.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_it_loads(name: str) -> None:
    config = load_config(EXAMPLES / name, KINDS[name])
    assert getattr(config, "model", None) == EXAMPLES.parent / "models" / "tiny-python"


def test_serve_yaml_has_every_setting_at_its_default() -> None:
    path = EXAMPLES / "serve.yaml"
    shown = load_config(path, ServeConfig)
    assert shown == ServeConfig(model=shown.model)
    assert _names(yaml.safe_load(path.read_text())) == _names(yaml.safe_load(dump_config(shown)))


def test_by_hand_means_the_same_secret_and_control_address() -> None:
    router = load_config(EXAMPLES / "router.yaml", RouterConfig)
    for name in ("prefill_worker.yaml", "decode_worker.yaml"):
        worker = load_config(EXAMPLES / name, WorkerConfig)
        assert worker.routers == (router.router.control,)
        assert worker.cluster_token == router.cluster_token


def test_two_and_two() -> None:
    config = load_config(EXAMPLES / "laptop-2p2d.yaml", ServeConfig).model_copy(update={"cluster_token": "t"})
    names = [spec.name for spec in plan_processes(config, Machine(cores=2))]
    assert names == ["router-0", "prefill-0", "prefill-1", "decode-0", "decode-1"]


def _names(value: object, prefix: str = "") -> set[str]:
    """Paths of all settings."""
    if not isinstance(value, dict):
        return {prefix}
    return {name for key, below in value.items() for name in _names(below, f"{prefix}.{key}")}
