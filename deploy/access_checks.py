"""Checks of keys, certificates and secrets before a cluster runs: whether they can be used, who else can read them, and
what travels unencrypted."""

import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tandem.core.config import ServeConfig, is_loopback, with_secrets
from tandem.core.errors import ConfigError
from tandem.core.secret_source import file_of, is_reference
from tandem.deploy.checks import Finding, Grade
from tandem.router.api_keys import load_keys
from tandem.wire.server_tls import ServerTls


def check_access(config: ServeConfig, serve_file: Path | None = None) -> Iterator[Finding]:
    """`serve_file`: what `config` was read from."""
    yield from _unusable(config)
    yield from _readable_by_others(config, serve_file)
    yield from _unencrypted(config)


def _unusable(config: ServeConfig) -> Iterator[Finding]:
    """What would end a process at its start."""
    router, cluster_tls = config.router, config.cluster_tls
    loads: dict[str, Callable[[], object]] = {"cluster token": lambda: with_secrets(config)}
    if router.api_keys is not None:
        loads["API keys"] = partial(load_keys, router.api_keys)
    if router.tls is not None:
        loads["certificate"] = ServerTls.of_clients(router.tls).load
    if cluster_tls is not None:
        loads["cluster certificate"] = ServerTls.of_cluster(cluster_tls).load
    for subject, load in loads.items():
        try:
            load()
        except ConfigError as error:
            yield Finding(subject, Grade.FAILED, error.message, "mend the file, or the setting that names it")


def _readable_by_others(config: ServeConfig, serve_file: Path | None) -> Iterator[Finding]:
    token = config.cluster_token
    files = {
        "router.tls.key": None if config.router.tls is None else config.router.tls.key,
        "cluster_tls.key": None if config.cluster_tls is None else config.cluster_tls.key,
        "cluster_token": None if token is None else file_of(token) if is_reference(token) else serve_file,
    }
    for setting, path in files.items():
        if path is not None and _others_read(path):
            advice = f"run: chmod o-r {path}"
            yield Finding("secret", Grade.WARNING, f"all users can read {path}, which holds {setting}", advice)


def _others_read(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False  # whoever needs the file says so


def _unencrypted(config: ServeConfig) -> Iterator[Finding]:
    for setting, has_tls, what in (
        ("http", config.router.tls is not None, "prompts and API keys"),
        ("grpc", config.router.tls is not None, "prompts and API keys"),
        ("control", config.cluster_tls is not None, "requests and the cluster token"),
    ):
        address = getattr(config.router, setting)
        if not has_tls and not is_loopback(address):
            advice = f"set {'cluster_tls' if setting == 'control' else 'router.tls'}, or let something in front do TLS"
            text = f"{what} travel to router.{setting} ({address}) unencrypted"
            yield Finding("encryption", Grade.WARNING, text, advice)
