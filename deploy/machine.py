"""Resources of this machine for a deployment: cores, GPUs, memory, ports."""

import contextlib
import errno
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from tandem.core.address import ANY_HOSTS, split_address
from tandem.core.config import ServeConfig
from tandem.core.errors import ConfigError
from tandem.core.router_section import RouterSection
from tandem.deploy.topology import Machine

_PORTS_OF_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST_PORT = 10_000
_CGROUP = Path("/sys/fs/cgroup")
_TRIED_PORTS = 20


def this_machine() -> Machine:
    """Cores and memory that this process may use, within a container's limits, and visible NVIDIA devices."""
    return Machine(
        cores=usable_cores(),
        gpus=_visible_gpus(),
        memory_bytes=usable_memory_bytes(),
        multiplies_bf16=not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_flags()),
    )


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What the CPU can do, in the kernel's words; empty if it is not known."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """The cores of the affinity mask, or of the control group's CPU quota if the quota is smaller; at least one."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    except (OSError, ValueError):
        pass  # no control group of version 2, so no quota
    return max(cores, 1)


def usable_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """The machine's memory, or the control group's limit if that is smaller."""
    limit = _memory_limit(cgroup)
    total = int(psutil.virtual_memory().total)
    return total if limit is None else min(total, limit)


def available_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """What is free now, within the control group's limit. Cached files count as free."""
    available = int(psutil.virtual_memory().available)
    limit = _memory_limit(cgroup)
    if limit is None:
        return available
    counts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    in_use = int((cgroup / "memory.current").read_text()) - int(counts["inactive_file"])
    return max(0, min(available, limit - in_use))


def _memory_limit(cgroup: Path) -> int | None:
    """None: no control group of version 2, or one without a limit."""
    try:
        return int((cgroup / "memory.max").read_text())
    except (OSError, ValueError):
        return None


def _visible_gpus() -> int:
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])


def listening_process(port: int) -> str | None:
    """'name (pid)' of the process that listens on the port, if this user may see the process."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return None
    for connection in connections:
        if (
            connection.status == psutil.CONN_LISTEN
            and connection.laddr
            and connection.laddr.port == port
            and connection.pid
        ):
            try:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
            except psutil.Error:
                return f"pid {connection.pid}"
    return None


def check_address(setting: str, address: str) -> str:
    """`address`, with a free port in the place of port 0. Raises ConfigError if the address cannot be used; the message
    names the process that listens there."""
    host, port = split_address(address)
    for candidate in () if port else _rarely_used_ports():
        with contextlib.suppress(OSError):
            return _listen_once(host, candidate)
    try:
        return _listen_once(host, port)
    except OSError as error:
        holder = listening_process(port) if error.errno == errno.EADDRINUSE else None
        reason = f"in use by {holder}" if holder else (error.strerror or "not an address").lower()
        raise ConfigError(
            f"cannot listen on {setting} {address} ({reason}); "
            f"choose another with --set {setting}=HOST:PORT (port 0: any free one)"
        ) from error


def _rarely_used_ports() -> list[int]:
    """Some below those that the kernel gives to connections: a port of those may be taken again before the process that
    it is for listens. Empty if the kernel uses nearly all."""
    try:
        first_used = int(_PORTS_OF_CONNECTIONS.read_text().split()[0])
    except (OSError, ValueError):
        return []
    if first_used < 2 * _LOWEST_PORT:
        return []
    return [_LOWEST_PORT + secrets.randbelow(first_used - _LOWEST_PORT) for _ in range(_TRIED_PORTS)]


def _listen_once(host: str, port: int) -> str:
    """The address, with the actual port. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        probe.listen()
        chosen = probe.getsockname()[1]
    return f"[{host}]:{chosen}" if ":" in host else f"{host}:{chosen}"


def check_distinct(addresses: Mapping[str, str]) -> None:
    """Raises ConfigError if two of the router's addresses, by setting, are one. A host of all interfaces is equal to
    every host; port 0 is a port of its own."""
    known = [(name, *split_address(address)) for name, address in addresses.items()]
    for index, (name, host, port) in enumerate(known):
        for other_name, other_host, other_port in known[:index]:
            if port == other_port != 0 and (host == other_host or {host, other_host} & set(ANY_HOSTS)):
                raise ConfigError(
                    f"router.{other_name} and router.{name} are both {addresses[name]}; they need different ports, "
                    f"for example --set router.{name}={host}:0 for any free one"
                )


def resolve_addresses(config: ServeConfig) -> ServeConfig:
    """The configuration with ports that are known and free now. Raises ConfigError with all addresses in use."""
    mistakes: list[str] = []
    resolved: dict[str, str] = {}
    for name in ("http", "grpc", "control"):
        try:
            resolved[name] = check_address(f"router.{name}", getattr(config.router, name))
        except ConfigError as error:
            mistakes.append(error.message)
    try:
        check_distinct(resolved)
    except ConfigError as error:
        mistakes.append(error.message)
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    router: RouterSection = config.router.model_copy(update=resolved)
    return config.model_copy(update={"router": router})
