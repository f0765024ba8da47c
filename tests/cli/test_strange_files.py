"""A path that is named to a command may be that of anything. Each command says so, and reads nothing without end."""

import os
from pathlib import Path

import pytest

from tandem.cli.main import main

SLO = """\
model: Llama-3.1-8B
cluster: {nodes: [{device: H100-80GB-SXM5, devices: 2}]}
slo: [{ttft_s: 1, tpot_s: 1}]
workload: {dataset: sharegpt, rate: 1}
"""
PLAN = """\
model: Llama-3.1-8B
verdict: disaggregate
slo_file: slo.yaml
groups:
  - {role: prefill, instances: 1, device: H100-80GB-SXM5, kv_tokens: 300000}
  - {role: decode, instances: 1, device: H100-80GB-SXM5, kv_tokens: 300000}
"""
COMMANDS = [
    "serve FILE",
    "up FILE",
    "plan FILE -o new.yaml",
    "simulate FILE",
    "simulate plan.yaml --slo FILE",
    "simulate plan.yaml --trace FILE --rate 1",
    "router FILE",
    "worker FILE",
    "ranks FILE",
    "controller FILE --pods FILE",
    "render-k8s FILE",
    "explain r --router FILE",
    "chat --api-key-file FILE --address 127.0.0.1:1",
    "chat --ca FILE --address 127.0.0.1:1",
    "serve --set model=FOLDER",
    "simulate model.yaml --rate 1",
    "plan table.yaml -o new.yaml",
    "serve --set router.api_keys=file:FILE",
    "serve --set cluster_token=file:FILE",
    "router router.yaml",
]
CASES = [(command, kind) for command in COMMANDS for kind in ("endless", "pipe")] + [
    ("simulate plan.yaml --trace FILE --rate 1", kind) for kind in ("folder", "long line", "binary")
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder. `strange` is what commands are given, and `model` a checkpoint whose files are such."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TANDEM_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "slo.yaml").write_text(SLO)
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "model.yaml").write_text(PLAN.replace("Llama-3.1-8B", str(tmp_path / "model")))
    (tmp_path / "table.yaml").write_text(SLO.replace("dataset: sharegpt", "lengths: strange"))
    files = "{certificate: strange, key: strange}"
    (tmp_path / "router.yaml").write_text(f"model: model\nrouter:\n  tls: {files}\n")
    return tmp_path


def make(kind: str, path: Path) -> None:
    match kind:
        case "endless":
            path.symlink_to("/dev/zero")
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "long line":
            path.write_bytes(b"1" * (9 << 20))
        case "binary":
            path.write_bytes(bytes(range(256)))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("command", "kind"), CASES, ids=[f"{command}, {kind}" for command, kind in CASES])
def test_what_is_no_such_file_is_told_in_a_sentence(
    command: str, kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(kind, folder / "strange")
    (folder / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        make(kind, folder / "model" / name)
    argv = command.replace("FILE", "strange").replace("FOLDER", "model").split()
    assert main(argv) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith(f"tandem {argv[0]}: "), error
    assert any(name in error for name in ("strange", "model", "tokenizer.json", "/dev/zero")), error
    assert len(error) < 400
    assert "Traceback" not in error
