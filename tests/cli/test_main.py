"""The commands without a cluster: help, wrong use, and what they say when nothing runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.cli.main import main

COMMANDS = ["profile", "plan", "serve", "status", "chat", "scale", "stop", "doctor", "version"]


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"\n  tandem {command}" in text, "an example that can be copied"
    assert "--debug" in text


def test_the_first_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)
    assert "a first visit:" in text


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serf"])
    assert caught.value.code == 2
    assert "invalid choice: 'serf'" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["status"], ["stop"], ["scale", "--decode", "2"]])
def test_nothing_runs(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    assert capsys.readouterr().err == (
        f"tandem {argv[0]}: no `tandem serve` is running for this user; start one with: tandem serve\n"
    )


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["scale"], "say how many: --prefill N, --decode N or both"),
        (["scale", "--prefill", "0"], "--prefill must be at least 1, not 0"),
        (["serve", "none.yaml"], "none.yaml does not exist"),
        (
            ["serve", "--set", "model=/m", "--set", "decode.engine.thread=1"],
            "--set decode.engine.thread=1: decode.engine.thread is not a setting; did you mean threads?",
        ),
    ],
)
def test_wrong_use_is_one_sentence(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err == f"tandem {argv[0]}: {sentence}\n"


def test_every_mistake_of_a_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: m\nrouter:\n  htp: x\ndecode:\n  instances: none\n")
    assert main(["serve", str(file)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err == [
        f"tandem serve: {file} line 3: router.htp is not a setting; did you mean http?",
        f"tandem serve: {file} line 5: decode.instances must be a whole number, not 'none'",
    ]


def test_a_wrong_model_is_told_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ports = [f"--set=router.{name}=127.0.0.1:0" for name in ("http", "grpc", "control")]
    assert main(["serve", f"--set=model={tmp_path / 'none'}", *ports]) == 1
    assert capsys.readouterr().err == (
        f"tandem serve: the model {tmp_path / 'none'} is not a folder; "
        "it must hold config.json, tokenizer.json and weights\n"
    )
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert main(["serve", f"--set=model={tmp_path}", *ports]) == 1
    assert "Mamba" in capsys.readouterr().err


def test_no_traceback_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert main(["status"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("tandem ")


def test_help_is_quick_to_import() -> None:
    code = "import sys; import cli.main; heavy = {'torch', 'ray', 'transformers'} & set(sys.modules); assert not heavy"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
