"""Checks of this machine before a cluster runs on it. Each check examines one subject and gives advice.

A check returns findings and never raises for a problem. It changes nothing and leaves no files or processes.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from tandem.core.config import ServeConfig
from tandem.core.errors import ConfigError, TandemError
from tandem.deploy.finding import Finding, Grade, gib
from tandem.deploy.machine import check_address, check_distinct, cpu_flags, usable_cores
from tandem.deploy.ray_cluster import new_ray_folder
from tandem.deploy.run_state import StateFolders

_RAY_DISK_BYTES = 1 << 30
_RAY_SOCKET_CHARACTERS = len("/1/r/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
_MAX_SOCKET_CHARACTERS = 107  # of the path of a Unix socket
_EXTRAS = ("serve", "ray")  # of the distribution, for `tandem serve`
_INSTALL = "run: pip install 'tandem-serve[serve,ray]' (in the repository: make setup)"


def check_python() -> Finding:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Finding("python", Grade.OK, version)
    return Finding("python", Grade.FAILED, f"{version} is not supported", "use Python 3.11 or 3.12")


def check_packages(distribution: str = "tandem-serve") -> Finding:
    """Whether the packages that `tandem serve` requires are installed, in versions that the distribution allows."""
    try:
        required = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", Grade.FAILED, f"{distribution} is not installed", _INSTALL)
    wrong = [problem for line in required if (problem := _requirement_problem(Requirement(line)))]
    if wrong:
        return Finding("packages", Grade.FAILED, "; ".join(wrong), _INSTALL)
    return Finding("packages", Grade.OK, f"all that {distribution}[{','.join(_EXTRAS)}] requires")


def _requirement_problem(requirement: Requirement) -> str | None:
    if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("cli", *_EXTRAS)):
        return None
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} does not satisfy {requirement.specifier}"
    return None


def check_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Iterator[Finding]:
    flags = cpu_flags(cpuinfo)
    known = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags]
    text = f"{usable_cores()} cores, {' '.join(known) or 'no vector extension known'}"
    if "avx512f" in flags or "avx2" in flags or platform.machine() != "x86_64":
        yield Finding("cpu", Grade.OK, text)
    else:
        yield Finding("cpu", Grade.WARNING, text, "a CPU with AVX2 or AVX-512 is much faster")
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler:
        yield Finding("compiler", Grade.OK, compiler)
    else:
        yield Finding(
            "compiler",
            Grade.WARNING,
            "no C++ compiler",
            "install g++ (package build-essential) for the fast kernels",
        )


def check_shared_memory(shm: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Whether another process can map a KV pool, and whether there is disk space for the files of Ray."""
    from tandem.kv_transfer.pool import SharedPool, map_read_only

    try:
        pool = SharedPool.create(1 << 20)
        try:
            assert pool.fd is not None
            pool.tensor[0] = 7
            shared = int(map_read_only(pool.fd, 1 << 20)[0]) == 7
        finally:
            pool.close()
    except (OSError, TandemError) as error:
        advice = "check seccomp or container limits; without shared memory KV travels over gloo, which is slower"
        yield Finding("shared memory", Grade.FAILED, f"cannot share a memory file ({error})", advice)
    else:
        assert shared, "a mapping shows what the owner has written"
        yield Finding("shared memory", Grade.OK, "a KV pool can be mapped by another process")
    if shm.is_dir():
        free = psutil.disk_usage(str(shm)).free
        yield Finding("/dev/shm", Grade.OK, f"{gib(free)} free, none needed: KV pools are anonymous memory files")
    folder = tempfile.gettempdir()
    free = psutil.disk_usage(folder).free
    if free < _RAY_DISK_BYTES:
        yield Finding(
            "disk",
            Grade.FAILED,
            f"{gib(free)} free in {folder}",
            "free 1 GiB there for the files of Ray, or set TMPDIR",
        )
    else:
        yield Finding("disk", Grade.OK, f"{gib(free)} free in {folder}")


def check_ports(config: ServeConfig, own: Iterable[str] = ()) -> Iterator[Finding]:
    """Whether the router's ports are free; `own` are the addresses of the running cluster."""
    own_addresses = set(own)
    addresses = {name: getattr(config.router, name) for name in ("http", "grpc", "control")}
    try:
        check_distinct(addresses)
    except ConfigError as error:
        sentence, _, advice = error.message.partition("; ")
        yield Finding("ports", Grade.FAILED, sentence, advice)
    for name, address in addresses.items():
        if address in own_addresses:
            yield Finding(f"port {name}", Grade.OK, f"{address} is in use by the running cluster")
            continue
        try:
            check_address(f"router.{name}", address)
        except ConfigError as error:
            sentence, _, advice = error.message.partition("; ")
            yield Finding(f"port {name}", Grade.FAILED, sentence, advice)
        else:
            yield Finding(f"port {name}", Grade.OK, f"{address} is free")


def check_folders(folders: StateFolders, ray_folder: Path | None = None) -> Iterator[Finding]:
    """Whether the run's files can be made; `ray_folder` is where Ray's would be."""
    for folder in (folders.state, folders.logs):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            advice = "set TANDEM_STATE_DIR to a folder where you may write"
            yield Finding("folder", Grade.FAILED, f"{existing} cannot be written, where {folder} has to be", advice)
            return
    ray_folder = ray_folder or new_ray_folder()
    length = len(str(ray_folder).encode()) + _RAY_SOCKET_CHARACTERS
    if length > _MAX_SOCKET_CHARACTERS:
        text = f"the paths of Ray's sockets in {ray_folder.parent} would have {length} characters"
        advice = f"set TMPDIR to a folder whose path is shorter by {length - _MAX_SOCKET_CHARACTERS}, for example /tmp"
        yield Finding("folder", Grade.FAILED, text, advice)
    elif not os.access(ray_folder.parent, os.W_OK | os.X_OK):
        yield Finding("folder", Grade.FAILED, f"{ray_folder.parent} cannot be written", "set TMPDIR to another folder")
    else:
        yield Finding("folder", Grade.OK, f"{folders.state}, {folders.logs} and {ray_folder.parent} can be written")


def check_ray() -> Finding:
    """Does not import Ray: Ray reads its variables at import, and `tandem serve` has to set them first."""
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:
        return Finding("ray", Grade.FAILED, "is not installed", _INSTALL)
    version = importlib.metadata.version("ray")
    server = Path(spec.origin).parent / "core" / "src" / "ray" / "raylet" / "raylet"
    if not server.is_file():
        return Finding("ray", Grade.FAILED, f"{version} has no raylet", "reinstall it: pip install --force ray")
    return Finding("ray", Grade.OK, version)


def check_gloo(timeout_s: float = 10.0) -> Finding:
    """Whether bytes that one rank sends to another on loopback arrive unchanged. Both ranks are in this process."""
    from tandem.deploy.gloo_check import exchange_bytes

    try:
        exchange_bytes(timeout_s)
    except TandemError as error:
        advice = "check that this user may open sockets on 127.0.0.1; KV between machines needs gloo"
        return Finding("gloo", Grade.FAILED, error.message, advice)
    return Finding("gloo", Grade.OK, "two ranks on loopback exchange bytes")
