"""Secrets that a configuration names."""

from pathlib import Path

import pytest

from tandem.cli.common import read_api_key
from tandem.core.config import RouterConfig, ServeConfig, WorkerConfig, with_secrets
from tandem.core.config_file import dump_config, load_config
from tandem.core.errors import ConfigError


@pytest.mark.parametrize("kind", [ServeConfig, RouterConfig, WorkerConfig])
def test_a_token_may_be_elsewhere(
    kind: type[ServeConfig | RouterConfig | WorkerConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "token").write_text("from a file\n")
    monkeypatch.setenv("THE_TOKEN", "from the environment")
    file = tmp_path / "config.yaml"
    for written, expected in (
        ("file:secrets/token", "from a file"),
        ("env:THE_TOKEN", "from the environment"),
        ("itself", "itself"),
    ):
        file.write_text(f"model: m\ncluster_token: {written}\n")
        config = load_config(file, kind)
        resolved = with_secrets(config)
        assert resolved.cluster_token == expected
        assert expected not in repr(resolved)
        assert expected == "itself" or expected not in dump_config(config), "what is written down is the reference"


@pytest.mark.parametrize("source", ["file:nowhere", "file:.", "file:empty", "env:NOT_SET", "file:latin"])
def test_a_secret_that_is_not_there(source: str, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes(b"\xe9")
    file = tmp_path / "config.yaml"
    file.write_text(f"model: m\ncluster_token: {source}\n")
    with pytest.raises(ConfigError, match="the secret"):
        with_secrets(load_config(file, RouterConfig))


def test_the_key_of_a_command_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TANDEM_API_KEY", raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv("TANDEM_API_KEY", "from the environment")
    assert read_api_key(None) == "from the environment"
    (tmp_path / "key").write_text("from a file\n")
    assert read_api_key(tmp_path / "key") == "from a file"


@pytest.mark.parametrize("secret", ["schl\u00fcssel", "two\nlines", " spaces "])
def test_a_secret_that_no_header_can_have_is_refused_and_not_shown(
    secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="printable characters of ASCII only") as caught:
        with_secrets(ServeConfig(model=Path("m"), cluster_token=secret))
    assert secret not in caught.value.message
    if secret == secret.strip():
        monkeypatch.setenv("TANDEM_API_KEY", secret)
        with pytest.raises(ConfigError, match="the variable TANDEM_API_KEY holds no API key"):
            read_api_key(None)
