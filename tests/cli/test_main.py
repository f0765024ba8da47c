"""The commands without a cluster: help, wrong use, and what they say when nothing runs."""

import errno
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.cli.main import main
from tandem.deploy.run_state import RunState
from tests.absent import run_without

COMMANDS = [
    "profile", "plan", "simulate", "serve", "router", "worker", "render-k8s", "status", "chat", "scale", "stop",
    "schema", "doctor", "version",
]  # fmt: skip
SLO = """\
model: Llama-3.1-8B
cluster: {nodes: [{device: H100-80GB-SXM5, devices: 1}]}
slo: [{ttft_s: 1, tpot_s: 1}]
workload: {dataset: sharegpt, rate: 1}
"""


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"\n   tandem {command}" in text, "an example that can be copied"
    assert "--debug" in text
    assert "\033" not in text


def test_the_first_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"│ {command} " in text for command in COMMANDS)
    assert "first steps:" in text


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "tandem: Missing command; see tandem --help\n"),
        (["serf"], "tandem: No such command 'serf'. Did you mean 'serve'?; see tandem --help\n"),
        (["scale", "--decode", "two"], "tandem scale: Invalid value for '--decode': "),
        (["stop", "--then"], "tandem stop: No such option: --then"),
    ],
)
def test_a_wrong_command_line_is_status_2(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith(sentence)


@pytest.mark.parametrize("argv", [["status"], ["stop"], ["scale", "--decode", "2"], ["drain", "decode-0"]])
def test_nothing_runs(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    assert capsys.readouterr().err == (
        f"tandem {argv[0]}: no cluster is running for this user; start one with: tandem serve, or tandem up\n"
    )


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["scale"], "give at least one of --prefill N, --decode N and --colocated N"),
        (
            ["scale", "--prefill", "0"],
            "Invalid value for '--prefill': Input should be greater than or equal to 1; see tandem scale --help",
        ),
        (["serve", "none.yaml"], "none.yaml does not exist"),
        (
            ["stop", "--timeout", "nan"],
            "Invalid value for '--timeout': 'nan' is not a number of seconds from 0 to 1e+09; see tandem stop --help",
        ),
        (
            ["logs", "decode-0", "--lines", "99999999999"],
            "Invalid value for '--lines' / '-n': Input should be less than or equal to 1000000; see tandem logs --help",
        ),
        (
            ["serve", "--set", "model=/m", "--set", "decode.engine.thread=1"],
            "--set decode.engine.thread=1: decode.engine.thread is not a setting; did you mean threads?",
        ),
    ],
)
def test_wrong_use_is_one_sentence(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err == f"tandem {argv[0]}: {sentence}\n"


def test_a_name_that_no_file_can_have_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slo.yaml").write_text(SLO)
    assert main(["plan", str(tmp_path / "slo.yaml"), "-o", "x" * 300]) == 1
    assert capsys.readouterr().err == f"tandem plan: {'x' * 300}: File name too long\n"


def test_an_argument_that_is_no_text_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunState(1, 0.0, "m", *[f"127.0.0.1:{port}" for port in (1, 2, 3)], "token", "", "", controller="127.0.0.1:4")
    monkeypatch.setattr("tandem.cli.explain.find_router", lambda pid, file: run)
    assert main(["explain", "decode-\udcff"]) == 2
    assert capsys.readouterr().err == "tandem explain: 'decode-\\udcff' is not text in UTF-8\n"


@pytest.mark.parametrize("closed", ["1>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_are_no_fault(closed: str) -> None:
    code = "import sys; from tandem.cli.main import main; sys.exit(main(['version']))"
    shell = f'exec "$0" -c "$1" {closed}'
    done = subprocess.run(["sh", "-c", shell, sys.executable, code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


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


def test_what_the_machine_refuses_is_said_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/state/x")

    monkeypatch.setattr("tandem.cli.common.state_folders", full)
    assert main(["status"]) == 1
    assert capsys.readouterr().err == "tandem status: /state/x: No space left on device\n"


def test_a_machine_without_room_for_temporary_files_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tandem.cli.common.state_folders", full)
    assert main(["status"]) == 1
    assert capsys.readouterr().err == (
        "tandem status: No usable temporary directory found in ['/tmp']; set TMPDIR to a folder where you may write\n"
    )


def test_a_full_disk_is_told_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slo.yaml").write_text(SLO)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        status = main(["plan", str(tmp_path / "slo.yaml"), "-o", str(tmp_path / "plan.yaml")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    assert capsys.readouterr().err == f"tandem plan: {tmp_path / 'plan.yaml'} cannot be written (File too large)\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("tandem ")


def test_a_reader_that_has_gone_is_no_fault() -> None:
    code = "import sys; from tandem.cli.main import main; sys.exit(main(['schema', 'slo']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr.read() == b""


def test_help_loads_none_of_the_libraries_that_a_command_needs() -> None:
    heavy = "torch ray transformers matplotlib scipy numpy yaml grpc starlette tokenizers"
    ended = run_without(heavy, "from tandem.cli.main import main; sys.exit(main(['--help']))")
    assert ended.returncode == 0, ended.stderr
    assert "first steps:" in ended.stdout


@pytest.mark.parametrize(
    ("absent", "argv", "sentence"),
    [
        ("numpy", ["plan", "slo.yaml"], "tandem plan: `tandem plan` needs `pip install 'tandem-serve[plan]'`"),
        ("ray", ["plan", "slo.yaml", "--ray", "local"], "`tandem plan` needs `pip install 'tandem-serve[plan,ray]'`"),
        ("torch ray", ["serve"], "tandem serve: `tandem serve` needs `pip install 'tandem-serve[serve,ray]'`"),
        ("grpc", ["status"], "tandem status: `tandem status` needs `pip install 'tandem-serve[cli]'`"),
        ("typer", ["status"], "`tandem` needs `pip install 'tandem-serve[cli]'`"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(absent: str, argv: list[str], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "slo.yaml").write_text(SLO)
    ended = run_without(absent, f"from tandem.cli.main import main; sys.exit(main({argv!r}))", tmp_path)
    assert ended.returncode == 1
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr


_ONLY_FOR_SERVE = (
    "torch tokenizers safetensors starlette uvicorn httptools uvloop orjson prometheus_client grpc_health cryptography "
    "grpc_reflection"
)
_ONLY_FOR_PLAN = "scipy matplotlib"
_PLAN = """\
model: Llama-3.1-8B
verdict: colocate
slo_file: slo.yaml
groups: [{role: colocated, instances: 1, device: H100-80GB-SXM5, kv_tokens: 100000}]
"""
_SIMULATE = """\
import tandem.cli.plan, tandem.placement.planner
from tandem.cli.main import main
assert main(["simulate", "plan.yaml", "--requests", "20", "--report", "run.html"]) == 0
"""


@pytest.mark.parametrize(
    ("extra", "statements"),
    [
        ("cli", "from tandem.cli import chat, scale, schema, status, stop, version"),
        ("plan", _SIMULATE),
        ("serve", "import tandem.router.app, tandem.worker.app"),
        ("serve", "from tandem.cli import serve, doctor"),
    ],
)
def test_an_extra_is_enough_for_its_commands(extra: str, statements: str, tmp_path: Path) -> None:
    (tmp_path / "slo.yaml").write_text(SLO)
    (tmp_path / "plan.yaml").write_text(_PLAN)
    absent = {"cli": f"{_ONLY_FOR_SERVE} {_ONLY_FOR_PLAN} numpy", "plan": _ONLY_FOR_SERVE, "serve": _ONLY_FOR_PLAN}
    ended = run_without(f"{absent[extra]} ray tqdm", statements, tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_ctrl_c_leaves_no_traceback_while_libraries_are_imported(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join((str(tmp_path), *sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "tandem.cli.main", "version"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_leaves_no_traceback_while_a_command_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tandem.cli.main.importlib.import_module", interrupt)
    assert main(["version"]) == 130


def test_characters_that_the_output_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", output)
    assert main(["version"]) == 0
    print("naïve", file=output, flush=True)
    assert output.buffer.getvalue().endswith(b"na\\xefve\n")  # type: ignore[attr-defined]


def test_a_deleted_folder_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert main(["serve", "--launcher", "process"]) == 1
    assert capsys.readouterr().err == "tandem serve: the current folder was deleted; change to another one\n"
