"""What `tandem serve` makes of a plan and of an SLO file, up to the point where a cluster would start."""

from collections.abc import Callable
from pathlib import Path

import pytest

import tandem.cli.plan
from tandem.cli.serve_file import read_serve_file
from tandem.core.config_file import dump_config
from tandem.core.errors import ConfigError
from tandem.core.plan import Plan, PlanGroup
from tandem.core.slo_file import SloFile
from tandem.deploy.topology import Machine
from tandem.placement.evidence import Planned
from tests.placement.planned import plan_of, planned

BUILT_IN = Path(__file__).parents[2] / "models" / "tiny-python"
MACHINE = Machine(cores=2)
GROUPS = (
    PlanGroup(role="prefill", instances=1, device="cpu", kv_tokens=1000),
    PlanGroup(role="decode", instances=2, device="cpu", kv_tokens=1000),
)
SLO = f"""\
model: {BUILT_IN}
cluster: {{nodes: [{{device: cpu, devices: 3}}]}}
slo: [{{ttft_s: 0.4, tpot_s: 0.04}}]
workload: {{dataset: sharegpt, rate: 1}}
"""


def _written(folder: Path, plan: Plan) -> Path:
    path = folder / "some.yaml"
    path.write_text(f"# A plan\n{dump_config(plan)}")
    return path


def _answer_with(plan: Plan, monkeypatch: pytest.MonkeyPatch, **evidence: object) -> None:
    def search(slo: SloFile, file: Path, progress: Callable[[float, str], None], workers: int) -> Planned:
        return Planned(plan, planned(plan.verdict, **evidence).evidence)

    monkeypatch.setattr(tandem.cli.plan, "search", search)


def test_a_plan_is_told_by_its_settings_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _written(tmp_path, plan_of(BUILT_IN, GROUPS))
    to_serve = read_serve_file(path, ["router.http=127.0.0.1:9000"], MACHINE)
    assert to_serve.plan == plan_of(BUILT_IN, GROUPS)
    config = to_serve.config
    assert (config.model, config.decode[0].instances, config.router.http) == (BUILT_IN, 2, "127.0.0.1:9000")
    assert "1 prefill instance (tp1) and 2 decode instances (tp1) on cpu" in capsys.readouterr().out


def test_a_serve_file_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("model: m\nprefill: {instances: 3}\n")
    to_serve = read_serve_file(path, [], MACHINE)
    assert (to_serve.config.prefill[0].instances, to_serve.plan) == (3, None)


def test_a_plan_of_a_name_needs_a_checkpoint(tmp_path: Path) -> None:
    path = _written(tmp_path, plan_of(Path("Llama-3.1-8B"), GROUPS))
    with pytest.raises(ConfigError, match=r"of which only the name is known here; .* --set model=FOLDER"):
        read_serve_file(path, [], MACHINE)
    assert read_serve_file(path, [f"model={BUILT_IN}"], MACHINE).config.model == BUILT_IN


def test_pools_that_do_not_fit_the_machine_are_refused_at_once(tmp_path: Path) -> None:
    huge = [group.model_copy(update={"kv_tokens": 10**10}) for group in GROUPS]
    path = _written(tmp_path, plan_of(BUILT_IN, huge))
    with pytest.raises(ConfigError, match=r"does not fit this machine .* set cluster\.kv_memory"):
        read_serve_file(path, [], MACHINE)
    smaller = ["prefill.engine.kv_memory=1MiB", "decode.engine.kv_memory=1MiB"]
    assert read_serve_file(path, smaller, MACHINE).config.decode[0].engine.kv_memory == 1 << 20


def test_an_slo_file_is_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "slo.yaml"
    path.write_text(SLO)
    _answer_with(plan_of(BUILT_IN, GROUPS), monkeypatch)
    assert read_serve_file(path, [], MACHINE).config.decode[0].instances == 2
    assert capsys.readouterr().out.startswith("Disaggregate: ")


def test_nothing_is_started_for_an_slo_that_nothing_meets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "slo.yaml"
    path.write_text(SLO)
    _answer_with(Plan(model=str(BUILT_IN), verdict="infeasible", groups=()), monkeypatch)
    with pytest.raises(ConfigError, match=r"^Infeasible: the best plan reaches 90 % .*tandem plan .* --report"):
        read_serve_file(path, [], MACHINE)


def test_a_plan_that_misses_its_targets_is_not_run_by_chance(tmp_path: Path) -> None:
    plan = plan_of(BUILT_IN, GROUPS).model_copy(update={"verdict": "infeasible", "summary": "Too slow."})
    with pytest.raises(ConfigError, match=r"some\.yaml: this plan misses its targets \(Too slow\); .* set its verdict"):
        read_serve_file(_written(tmp_path, plan), [], MACHINE)


@pytest.mark.parametrize(("name", "text"), [("plan", "verdict: colocate\n"), ("SLO file", "slo: []\n")])
def test_half_a_file_is_told_what_its_kind_is_missing(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / "half.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="model is missing"):
        read_serve_file(path, [], MACHINE)
