"""`tandem serve` with TLS and API keys, and the commands that talk to it."""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tandem import ClientTls
from tandem.core.api_keys import digest_of, new_key
from tandem.models.random_checkpoint import CheckpointShape, write_random_checkpoint
from tests.certificates import Authority
from tests.cli.served import Served, serving
from tests.intruder import Port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
KEY = new_key()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    authority = Authority(folder, "ca")
    authority.issue("server")
    (folder / "keys.yaml").write_text(f"keys: [{{name: a, tenant: alice, sha256: '{digest_of(KEY)}'}}]\n")
    small = {"engine": {"kv_memory": "8MiB"}}
    files = {"certificate": "server.crt", "key": "server.key"}
    settings = {
        "model": str(write_random_checkpoint(folder / "little", CheckpointShape())),
        "cluster_tls": {**files, "ca": "ca.pem"},
        "router": {"api_keys": "file:keys.yaml", "tls": files},
        "prefill": small,
        "decode": small,
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(settings))
    with serving(folder, str(folder / "serve.yaml")) as served:
        yield served


def run(served: Served, *arguments: str, key: str | None = KEY, stdin: str = "") -> subprocess.CompletedProcess[str]:
    served.environment.pop("TANDEM_API_KEY", None)
    if key is not None:
        served.environment["TANDEM_API_KEY"] = key
    return served.tandem(*arguments, stdin=stdin)


def test_commands_reach_it(served: Served, folder: Path) -> None:
    ca = f"--ca={folder / 'ca.pem'}"
    chat = ["chat", "--complete", "--max-tokens", "4", "--temperature", "0"]
    answered = run(served, *chat, ca, stdin="a\n")
    assert answered.returncode == 0, answered.stderr
    refused = run(served, *chat, ca, key="wrong", stdin="a\n")
    assert (refused.returncode, "does not know the API key" in refused.stderr) == (1, True)
    assert run(served, *chat, stdin="a\n").returncode == 1, "public authorities have not signed it"
    assert f"https://{served.http}/v1" in run(served, "status").stdout
    assert re.search(r"'\w+': length", run(served, "explain").stdout)
    doctor = run(served, "doctor", str(folder / "serve.yaml"), ca)
    for name in ("over HTTP", "over gRPC", r"prefill-0-\w+ -> decode-0-\w+"):
        assert re.search(rf"^ok +\w+: {name}: two tokens in", doctor.stdout, re.MULTILINE), doctor.stdout
    without = run(served, "doctor", str(folder / "serve.yaml"), ca, key=None)
    assert re.search(r"^FAILED +request: over HTTP: .*status 401", without.stdout, re.MULTILINE), without.stdout
    text = served.output.read_text()
    assert "curl https://" in text
    assert '-H "Authorization: Bearer KEY"' in text


async def test_every_call_needs_certificate_and_token(served: Served, folder: Path) -> None:
    """On the ports of real processes, the controller's included."""
    (state,) = (json.loads(path.read_text()) for path in (folder / "state").glob("serve-*.json"))
    other_authority = Authority(folder, "other")
    own = ClientTls(folder / "ca.pem", folder / "server.crt", folder / "server.key")
    foreign = other_authority.issue("foreign")
    wrong_files = (None, ClientTls(own.ca), ClientTls(own.ca, foreign.certificate, foreign.key))
    status = json.loads(run(served, "status", "--json").stdout)
    token = state["cluster_token"]
    ports = [
        Port("control", state["control"], own, token),
        Port("controller", state["controller"], own, token),
        *(Port("instance", instance["address"], own, token) for instance in status["fleet"]["instances"]),
    ]
    assert len(ports) == 4
    for port in ports:
        await port.try_everything(wrong_files, (KEY,), but={"Stop"})
    await Port("public", served.grpc, ClientTls(own.ca), KEY).try_everything(
        (None, ClientTls(other_authority.ca)), (token,)
    )


def test_workers_stay_and_join(served: Served) -> None:
    """The controller asks for health over TLS: it ends no process that is well."""
    assert "starting it again" not in served.output.read_text()
    run(served, "scale", "--decode", "2")
    served.wait_for(r"^scaled$")
    assert run(served, "status").stdout.count("ready") >= 3
