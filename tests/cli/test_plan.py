"""`tandem plan` around the search: files in and out, what it prints, how it ends. The search is a stand-in."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest

import tandem.cli.plan
from tandem.cli.main import main
from tandem.cli.output import show_progress
from tandem.core.config_file import load_config
from tandem.core.plan import Plan, PlanGroup
from tandem.core.slo_file import SloFile
from tandem.placement.evidence import Planned
from tests.cli.terminal import Terminal
from tests.placement.planned import planned

BUILT_IN = Path(__file__).parents[2] / "models" / "tiny-python"
SLO = """\
model: Llama-3.1-70B
cluster: {nodes: [{device: H100, devices: 4}]}
slo: [{ttft_s: 0.4, tpot_s: 0.04}]
workload: {dataset: sharegpt, rate: 10}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slo.yaml").write_text(SLO)
    return tmp_path


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Planned], list[SloFile]]:
    """Makes the search answer so; returns the list in which its questions are kept."""

    def use(value: Planned) -> list[SloFile]:
        asked: list[SloFile] = []

        def search(
            slo: SloFile,
            file: Path,
            progress: Callable[[float, str], None],
            workers: int,
            ray: str | None,
            *,
            advice: bool,
        ) -> Planned:
            progress(0.5, "simulating")
            asked.append(slo)
            return value

        monkeypatch.setattr(tandem.cli.plan, "search", search)
        return asked

    return use


def test_it_writes_a_plan_that_reads_back_and_says_what_to_do(
    folder: Path, answer: Callable[[Planned], list[SloFile]], capsys: pytest.CaptureFixture[str]
) -> None:
    answer(planned())
    assert main(["plan", "slo.yaml"]) == 0
    assert load_config(folder / "plan.yaml", Plan) == planned().plan
    text = (folder / "plan.yaml").read_text()
    assert text.startswith(
        "# Disaggregate: 2 prefill instances (tp2) and 1 decode instance (tp1) on H100 serve 11.2 req/s"
    )
    out = capsys.readouterr().out
    assert "0:0+0:1 1:0+1:1" in out, "where the instances stand"
    assert "92.1 % meet both targets (95 %: 90.5 to 93.6 %; required 90 %)" in out
    assert "A thousand requests cost 0.597 USD" in out
    assert "The single change that helps most, simulated on the same requests: TPOT targets 20 %" in out
    assert "a step is mostly linear layers in prefill, KV reads in decode" in out
    assert "TTFT is 1.4 x its target" in out
    assert "not for this machine yet: the plan uses 2 nodes, and this is one machine" in out
    assert not (folder / "plan.html").exists()


@pytest.mark.parametrize(("model", "more"), [(str(BUILT_IN), ""), ("Llama-3.1-8B", " --set model=FOLDER")])
def test_it_says_how_to_run_what_can_be_run_here(
    model: str, more: str, answer: Callable[[Planned], list[SloFile]], capsys: pytest.CaptureFixture[str]
) -> None:
    groups = tuple(
        PlanGroup.model_validate({"role": role, "instances": 1, "device": "cpu", "kv_tokens": 1000})
        for role in ("prefill", "decode")
    )
    value = planned()
    answer(Planned(value.plan.model_copy(update={"model": model, "groups": groups}), value.evidence))
    assert main(["plan", "slo.yaml", "-o", "chat.yaml"]) == 0
    assert capsys.readouterr().out.endswith(f"\nrun it  tandem serve chat.yaml{more}\n")


def test_settings_replace_those_of_the_file(answer: Callable[[Planned], list[SloFile]]) -> None:
    asked = answer(planned())
    assert main(["plan", "slo.yaml", "--set", "workload.rate=20", "--set", "search.max_tp=4"]) == 0
    assert (asked[0].workload.rate, asked[0].search.max_tp) == (20.0, 4)


def test_no_plan_is_status_3_and_still_tells_what_comes_nearest(
    folder: Path, answer: Callable[[Planned], list[SloFile]], capsys: pytest.CaptureFixture[str]
) -> None:
    answer(planned("infeasible"))
    assert main(["plan", "slo.yaml", "--report", "why.html"]) == 3
    assert capsys.readouterr().out.startswith("Infeasible: the best plan reaches 90 % at TTFT 0.9 s.\n")
    assert load_config(folder / "plan.yaml", Plan).verdict == "infeasible"
    assert "</html>" in (folder / "why.html").read_text()


def test_a_plan_edited_by_hand_is_not_replaced_by_chance(
    folder: Path, answer: Callable[[Planned], list[SloFile]], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = answer(planned())
    (folder / "plan.yaml").write_text("mine")
    assert main(["plan", "slo.yaml"]) == 2
    assert capsys.readouterr().err == (
        "tandem plan: plan.yaml exists already; name it with -o plan.yaml to replace it\n"
    )
    assert not asked, "told before the search, which takes a while"
    assert main(["plan", "slo.yaml", "-o", "plan.yaml"]) == 0


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "name an SLO file: tandem plan slo.yaml (or --devices, or --models)"),
        (["none.yaml"], "none.yaml does not exist"),
        (["slo.yaml", "--workers", "-1"], "Invalid value for '--workers': Input should be greater than or equal to 0"),
        (["slo.yaml", "--ray", "local", "--workers", "2"], "--workers is for this machine alone"),
        (["slo.yaml", "-o", "."], ". is a folder; name a file"),
        (["slo.yaml", "-o", "/proc/plan.yaml"], "/proc/plan.yaml cannot be written ("),
        (["slo.yaml", "--report", "/proc/why.html"], "/proc/why.html cannot be written ("),
        (
            ["slo.yaml", "--set", "workload.rat=2"],
            "--set workload.rat=2: workload.rat is not a setting; did you mean rate?",
        ),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    argv: list[str],
    sentence: str,
    answer: Callable[[Planned], list[SloFile]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = answer(planned())
    assert main(["plan", *argv]) == 2
    assert f"tandem plan: {sentence}" in capsys.readouterr().err
    assert not asked, "told before the search"


def test_no_file_is_written_over_another_of_the_same_command(
    folder: Path, answer: Callable[[Planned], list[SloFile]], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = answer(planned())
    assert main(["plan", "slo.yaml", "-o", str(folder / "slo.yaml")]) == 2
    assert "would be both the SLO file and the plan" in capsys.readouterr().err
    assert main(["plan", "slo.yaml", "-o", "out", "--report", "./out"]) == 2
    assert "would be both the plan and the report" in capsys.readouterr().err
    assert not asked, "told before the search"
    assert (folder / "slo.yaml").read_text() == SLO


def test_ctrl_c_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> Planned:
        raise KeyboardInterrupt

    monkeypatch.setattr(tandem.cli.plan, "search", interrupted)
    assert main(["plan", "slo.yaml"]) == 130
    assert not (folder / "plan.yaml").exists()


@pytest.mark.parametrize(("flag", "name"), [("--devices", "H100"), ("--models", "Llama-3.1-70B")])
def test_the_catalogues_are_listed_without_a_file(flag: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", flag]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.isupper()
    assert any(row.startswith(name) for row in rows)


def test_progress_draws_a_bar_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        with show_progress(stream) as progress:
            progress(0.25, "simulating")
    assert "25 %" in terminal.getvalue()
    assert "simulating" in terminal.getvalue()
    assert pipe.getvalue() == "", "a short search tells a pipe nothing"


def test_progress_tells_a_pipe_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("tandem.cli.output.time.monotonic", lambda: now_s)
    pipe = io.StringIO()
    with show_progress(pipe) as progress:
        for share in (0.1, 0.2, 0.3):
            now_s += 6.0
            progress(share, "simulating")
    assert pipe.getvalue() == " 20% simulating\n"


def test_a_cpu_that_nobody_measured_is_noted() -> None:
    node = {"device": "cpu", "devices": 2}
    question = {"model": "m", "slo": [{"ttft_s": 1, "tpot_s": 1}], "workload": {"dataset": "sharegpt"}}

    def noted(*nodes: dict[str, object]) -> list[str]:
        return tandem.cli.plan.uncalibrated(SloFile.model_validate(question | {"cluster": {"nodes": nodes}}))

    assert noted(node) == ["cpu"]
    assert noted(node | {"calibration": "laptop.yaml"}, {"device": "H100"}) == []
