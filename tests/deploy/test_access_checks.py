"""What is said about keys, certificates and secrets before anything starts."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.core.api_keys import digest_of
from tandem.core.config import ServeConfig
from tandem.core.config_file import load_config
from tandem.deploy.access_checks import check_access
from tandem.deploy.finding import Grade
from tests.certificates import Authority

_DAY_S = 24 * 3600.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of a cluster with TLS and keys, in good order."""
    authority = Authority(tmp_path, "ca")
    authority.issue("server")
    (tmp_path / "keys.yaml").write_text(f"keys: [{{name: a, tenant: a, sha256: '{digest_of('k')}'}}]\n")
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o600)
    path = tmp_path / "serve.yaml"
    path.write_text(
        "model: m\ncluster_token: file:token\ncluster_tls: {certificate: server.crt, key: server.key, ca: ca.pem}\n"
        "router: {http: '0.0.0.0:8000', control: '0.0.0.0:8002', api_keys: file:keys.yaml, "
        "tls: {certificate: server.crt, key: server.key}}\n"
    )
    return path


def findings(file: Path, wall_clock: Callable[[], float] = time.time) -> list[tuple[Grade, str]]:
    found = check_access(load_config(file, ServeConfig), file, wall_clock)
    return [(finding.grade, finding.text) for finding in found]


def test_nothing_is_said_of_what_is_in_order(file: Path) -> None:
    assert findings(file) == []
    file.write_text("model: m\n")
    assert findings(file) == []


@pytest.mark.parametrize("name", ["token", "keys.yaml", "server.key", "ca.pem"])
def test_what_would_end_a_process_is_said_at_once(name: str, file: Path) -> None:
    (file.parent / name).unlink()
    found = findings(file)
    assert {grade for grade, _ in found} == {Grade.FAILED}
    assert all(name in text for _, text in found)


def test_secrets_that_all_users_can_read(file: Path) -> None:
    for name in ("token", "server.key"):
        (file.parent / name).chmod(0o644)
    text = "\n".join(text for grade, text in findings(file) if grade is Grade.WARNING)
    assert text.count("all users can read") == 3, "the key has two uses"
    file.write_text("model: m\ncluster_token: itself\n")
    file.chmod(0o644)
    ((grade, said),) = findings(file)
    assert (grade, said) == (Grade.WARNING, f"all users can read {file}, which holds cluster_token")
    file.chmod(0o600)
    assert findings(file) == []


def test_certificates_that_expire(file: Path) -> None:
    assert findings(file, lambda: time.time() + 22 * _DAY_S) == []
    soon = findings(file, lambda: time.time() + 24 * _DAY_S)
    assert [(grade, "server.crt expires soon: it is valid until 20" in text) for grade, text in soon] == [
        (Grade.WARNING, True)
    ] * 2, "the certificate has two uses"
    authority = Authority(file.parent, "ca")
    authority.issue("server", is_expired=True)
    assert [(grade, "server.crt has expired: " in text) for grade, text in findings(file)] == [(Grade.FAILED, True)] * 2


def test_what_travels_unencrypted(file: Path) -> None:
    file.write_text(
        "model: m\nrouter: {http: '0.0.0.0:1', control: '10.0.0.1:2', allow_anonymous: true}\ncontroller: '0.0.0.0:3'\n"
    )
    assert [text for _, text in findings(file)] == [
        "prompts and API keys travel to router.http (0.0.0.0:1) unencrypted",
        "requests and the cluster token travel to router.control (10.0.0.1:2) unencrypted",
        "commands and the cluster token travel to controller (0.0.0.0:3) unencrypted",
    ]
