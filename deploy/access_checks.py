"""Checks of keys, certificates and secrets before a cluster runs: whether they can be used, who else can read them, and
what travels unencrypted."""

import stat
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from tandem.core.address import is_loopback
from tandem.core.config import ServeConfig, with_secrets
from tandem.core.errors import ConfigError
from tandem.core.secret_source import file_of, is_reference
from tandem.deploy.finding import Finding, Grade
from tandem.router.api_keys import load_keys
from tandem.wire.server_tls import ServerTls

_SOON_S = 7 * 24 * 3600.0  # as the alert TandemCertificateExpires


def check_access(
    config: ServeConfig, serve_file: Path | None = None, wall_clock: Callable[[], float] = time.time
) -> Iterator[Finding]:
    """`serve_file`: what `config` was read from. `wall_clock`: seconds since 1970, for the expiry of certificates."""
    yield from _unusable(config)
    yield from _certificates(config, wall_clock())
    yield from _readable_by_others(config, serve_file)
    yield from _unencrypted(config)


def _unusable(config: ServeConfig) -> Iterator[Finding]:
    """Secrets that would end a process at its start."""
    loads: dict[str, Callable[[], object]] = {"cluster token": lambda: with_secrets(config)}
    if config.router.api_keys is not None:
        loads["API keys"] = partial(load_keys, config.router.api_keys)
    for subject, load in loads.items():
        try:
            load()
        except ConfigError as error:
            yield _unusable_file(subject, error)


def _unusable_file(subject: str, error: ConfigError) -> Finding:
    return Finding(subject, Grade.FAILED, error.message, "mend the file, or the setting that names it")


def _certificates(config: ServeConfig, now_s: float) -> Iterator[Finding]:
    """Those that would end a process at its start, that nobody accepts any more, or soon."""
    found = []
    if config.router.tls is not None:
        found.append(("certificate", ServerTls.of_clients(config.router.tls)))
    if config.cluster_tls is not None:
        found.append(("cluster certificate", ServerTls.of_cluster(config.cluster_tls)))
    for subject, tls in found:
        try:
            tls.load()
        except ConfigError as error:
            yield _unusable_file(subject, error)
            continue
        if tls.not_after_s is None or tls.not_after_s > now_s + _SOON_S:
            continue
        is_over = tls.not_after_s <= now_s
        when = datetime.fromtimestamp(tls.not_after_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
        text = f"{tls.certificate} {'has expired' if is_over else 'expires soon'}: it is valid until {when}"
        advice = "replace the files; running processes read them again"
        yield Finding(subject, Grade.FAILED if is_over else Grade.WARNING, text, advice)


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
    router = config.router
    for setting, address, tls, what in (
        ("router.http", router.http, "router.tls", "prompts and API keys"),
        ("router.grpc", router.grpc, "router.tls", "prompts and API keys"),
        ("router.control", router.control, "cluster_tls", "requests and the cluster token"),
        ("controller", config.controller, "cluster_tls", "commands and the cluster token"),
    ):
        has_tls = (router.tls if tls == "router.tls" else config.cluster_tls) is not None
        if not has_tls and not is_loopback(address):
            text = f"{what} travel to {setting} ({address}) unencrypted"
            yield Finding("encryption", Grade.WARNING, text, f"set {tls}, or let something in front do TLS")
