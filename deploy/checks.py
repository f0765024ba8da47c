"""Checks of this machine before a cluster runs on it. Each check examines one subject and gives advice.

A check returns findings and never raises for a problem. It changes nothing and leaves no files or processes.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from tandem.core.clock import SystemClock
from tandem.core.config import ServeConfig
from tandem.core.errors import ConfigError, TandemError
from tandem.core.instance_section import EngineSection, InstanceSection
from tandem.core.model_spec import ModelSpec
from tandem.core.session import InstanceStatus
from tandem.deploy.machine import available_memory_bytes, check_address, check_distinct, usable_cores
from tandem.deploy.model_folder import check_model_folder, check_pairs, weight_bytes
from tandem.deploy.ray_cluster import new_ray_folder
from tandem.deploy.run_state import StateFolders
from tandem.deploy.topology import Machine, uses_gpu

_GIB = 1 << 30
_RAY_DISK_BYTES = 1 << 30
_RAY_SOCKET_CHARACTERS = len("/1/r/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
_MAX_SOCKET_CHARACTERS = 107  # of the path of a Unix socket
_MIN_BLOCKS = 2  # one for a prompt, one for its answer
_EXTRAS = ("serve", "ray")  # of the distribution, for `tandem serve`
_INSTALL = "run: pip install 'tandem-serve[serve,ray]' (in the repository: make setup)"


class Grade(Enum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of a check. `advice` is empty if nothing is to be done."""

    subject: str
    grade: Grade
    text: str
    advice: str = ""


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
    flags = _cpu_flags(cpuinfo)
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


def _cpu_flags(cpuinfo: Path) -> set[str]:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def check_memory(config: ServeConfig, available_bytes: int | None = None) -> Finding:
    """Compare the KV pools and weights of all instances with the memory that is free now."""
    available = available_memory_bytes() if available_bytes is None else available_bytes
    kv = sum(section.instances * section.engine.kv_memory for _, section in config.kinds)
    weights = sum(section.instances for _, section in config.kinds) * weight_bytes(config.model)
    text = f"{_gib(kv)} of KV pools and {_gib(weights)} of weights, {_gib(available)} available"
    if kv + weights <= 0.9 * available:
        return Finding("memory", Grade.OK, text)
    settings = " and ".join(dict.fromkeys(f"{role}.engine.kv_memory" for role, _ in config.kinds))
    advice = f"lower {settings}, or run fewer instances"
    return Finding("memory", Grade.FAILED, text, advice)


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
        yield Finding("/dev/shm", Grade.OK, f"{_gib(free)} free, none needed: KV pools are anonymous memory files")
    folder = tempfile.gettempdir()
    free = psutil.disk_usage(folder).free
    if free < _RAY_DISK_BYTES:
        yield Finding(
            "disk",
            Grade.FAILED,
            f"{_gib(free)} free in {folder}",
            "free 1 GiB there for the files of Ray, or set TMPDIR",
        )
    else:
        yield Finding("disk", Grade.OK, f"{_gib(free)} free in {folder}")


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


def check_settings(config: ServeConfig, machine: Machine) -> Iterator[Finding]:
    """Settings that this machine or this model does not allow. Cheap: reads config.json only, and imports no torch.
    Nothing about a model that cannot be read, of which `check_checkpoint` tells."""
    try:
        spec = check_model_folder(config.model)
    except TandemError:
        return
    for role, section in config.kinds:
        yield from _section_findings(role, section, spec, machine)
    threads = sum(section.instances * section.engine.threads for _, section in config.kinds)
    if threads > machine.cores:
        text = f"{threads} threads of instances for {machine.cores} cores"
        yield Finding("threads", Grade.WARNING, text, "lower engine.threads, or set it to 0 to share the cores")


def _section_findings(role: str, section: InstanceSection, spec: ModelSpec, machine: Machine) -> Iterator[Finding]:
    engine = section.engine
    yield from _device_findings(role, section, machine)
    limit = spec.max_context_tokens
    if engine.max_model_len is not None and engine.max_model_len > limit:
        text = f"{role}.engine.max_model_len is {engine.max_model_len}, but the model's context has {limit} tokens"
        yield Finding("context", Grade.FAILED, text, f"set it to {limit} or less, or leave it out")
    block = spec.kv_bytes_per_token(_kv_number_bytes(engine, spec, machine)) * engine.block_size
    blocks = engine.kv_memory // block
    wanted = min(engine.max_model_len or limit, limit)
    memory_bytes = None if uses_gpu(engine, machine) else machine.memory_bytes
    if memory_bytes is not None and engine.kv_memory > memory_bytes:
        text = f"{role}.engine.kv_memory is {_gib(engine.kv_memory)}, and this machine has {_gib(memory_bytes)}"
        yield Finding("kv memory", Grade.FAILED, text, f"lower {role}.engine.kv_memory")
    elif blocks < _MIN_BLOCKS:
        text = (
            f"{role}.engine.kv_memory is {engine.kv_memory} bytes, which is room for {blocks} blocks of "
            f"{engine.block_size} tokens with {block} bytes each"
        )
        yield Finding("kv memory", Grade.FAILED, text, f"set it to {_MIN_BLOCKS * block} or more, for example 512MiB")
    elif blocks * engine.block_size < wanted:
        text = f"{role}.engine.kv_memory has room for {blocks * engine.block_size} of {wanted} tokens"
        yield Finding("kv memory", Grade.WARNING, text, "longer requests are refused; raise it to allow them")


def _device_findings(role: str, section: InstanceSection, machine: Machine) -> Iterator[Finding]:
    name, device = f"{role}.engine.device", section.engine.device
    on_gpu = uses_gpu(section.engine, machine)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        yield Finding("device", Grade.FAILED, f"{name} is {device}, which is no device", "use auto, cpu or cuda")
    elif device.startswith("cuda") and not machine.gpus:
        text = f"{name} is {device}, but this machine has no GPU"
        yield Finding("device", Grade.FAILED, text, f"set {name} to cpu or auto")
    elif device.startswith("cuda:") and device != "cuda:0":
        text = f"{name} is {device}, but each instance of `tandem serve` sees one GPU, the one that it is given"
        yield Finding("device", Grade.FAILED, text, f"set {name} to cuda; CUDA_VISIBLE_DEVICES says which GPUs to use")
    if role != "colocated" and section.engine.shape.num_ranks > 1 and on_gpu:
        text = (
            f"{role} instances have {section.engine.shape.num_ranks} GPUs each, and KV moves between single GPUs only"
        )
        yield Finding("device", Grade.FAILED, text, f"set {name} to cpu, or {role}.engine.tp and pp to 1")
    if section.engine.ops == "native" and on_gpu:
        text = f"{role}.engine.ops is native, but these kernels run on CPUs only"
        yield Finding("ops", Grade.FAILED, text, f"set {role}.engine.ops to auto, or {name} to cpu")
    if section.transport == "nccl" and not on_gpu:
        text = f"{role}.transport is nccl, which moves KV between GPUs only"
        yield Finding("transport", Grade.FAILED, text, f"set {role}.transport to auto")
    if section.transport == "shared_memory" and section.kv_codec != "none":
        text = f"{role}.kv_codec is {section.kv_codec}, and KV in shared memory is copied as it is"
        yield Finding("transport", Grade.WARNING, text, f"set {role}.kv_codec to none, or {role}.transport to auto")


def _kv_number_bytes(engine: EngineSection, spec: ModelSpec, machine: Machine) -> int:
    """As `engine.device.choose_dtype`, which needs torch."""
    if engine.dtype != "auto":
        return 4 if engine.dtype == "float32" else 2
    on_cpu = engine.device == "cpu" or not machine.gpus
    if spec.dtype == "float32" or (on_cpu and not {"avx512_bf16", "amx_bf16"} & _cpu_flags(Path("/proc/cpuinfo"))):
        return 4
    return 2


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


def check_checkpoint(config: ServeConfig) -> Iterator[Finding]:
    """Whether the model's files are complete and of a supported family. Reads the files' headers and hashes."""
    try:
        check_pairs(config, check_model_folder(config.model))
        from tandem.engine.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(config.model)
    except TandemError as error:
        yield Finding(
            "model", Grade.FAILED, error.message, "choose another model with --set model=FOLDER, or repair this one"
        )
        return
    spec = checkpoint.spec
    text = f"{config.served_name}: {spec.architecture}, {spec.num_parameters / 1e6:.1f} M parameters"
    yield Finding("model", Grade.OK, f"{text}, context {spec.max_context_tokens}")
    try:
        from tandem.router.sampling_defaults import load_sampling_defaults
        from tandem.router.tokenizer import TextTokenizer

        with ThreadPoolExecutor(1) as executor:
            TextTokenizer.load(
                config.model,
                clock=SystemClock(),
                executor=executor,
                parse_control_tokens=config.router.parse_control_tokens,
            )
        load_sampling_defaults(config.model, config.router.generation_config)
    except TandemError as error:
        advice = "download the tokenizer's files from the model's publisher again"
        yield Finding("tokenizer", Grade.FAILED, error.message, advice)
    else:
        yield Finding("tokenizer", Grade.OK, "tokenizer.json")


def check_gloo(timeout_s: float = 10.0) -> Finding:
    """Whether bytes that one rank sends to another on loopback arrive unchanged. Both ranks are in this process."""
    from tandem.deploy.gloo_check import exchange_bytes

    try:
        exchange_bytes(timeout_s)
    except TandemError as error:
        advice = "check that this user may open sockets on 127.0.0.1; KV between machines needs gloo"
        return Finding("gloo", Grade.FAILED, error.message, advice)
    return Finding("gloo", Grade.OK, "two ranks on loopback exchange bytes")


def check_links(instances: Iterable[InstanceStatus], expected_transport: str | None) -> Iterator[Finding]:
    """Whether links use the expected transport without failures, and every KV block has an owner.

    With `expected_transport` None any transport is accepted.
    """
    for status in instances:
        if status.blocks.leaked:
            text = f"{status.blocks.leaked} KV blocks of {status.instance_id} have no owner"
            yield Finding(
                "blocks",
                Grade.FAILED,
                text,
                "a fault in tandem: report it with the logs; restart the cluster",
            )
        for link in status.links:
            name = f"{link.peer_id} -> {status.instance_id}"
            if expected_transport is not None and link.transport != expected_transport:
                advice = f"{expected_transport} was expected: the log of {status.instance_id} says why it failed"
                yield Finding("link", Grade.FAILED, f"{name} uses the transport {link.transport}", advice)
            elif link.failures:
                advice = f"the log of {status.instance_id} says why"
                yield Finding("link", Grade.WARNING, f"{name}: {link.failures} transfers failed", advice)
            else:
                yield Finding("link", Grade.OK, f"{name}: {link.transport}, {link.transfers} transfers")


def _gib(count: int) -> str:
    return f"{count / _GIB:.1f} GiB"
