import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.core.address import split_address
from tandem.core.config import ServeConfig
from tandem.core.errors import ConfigError
from tandem.core.router_section import RouterSection
from tandem.deploy.machine import (
    available_memory_bytes,
    check_address,
    listening_process,
    resolve_addresses,
    usable_cores,
    usable_memory_bytes,
)


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def serve_config(**router: str) -> ServeConfig:
    return ServeConfig(model=Path("/m"), router=RouterSection.model_validate(router))


def test_port_zero_becomes_a_port() -> None:
    config = resolve_addresses(serve_config(http="127.0.0.1:0", grpc="127.0.0.1:0", control="127.0.0.1:0"))
    ports = {split_address(address)[1] for address in (config.router.http, config.router.grpc, config.router.control)}
    assert len(ports) == 3
    first_used = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert first_used < 20_000 or all(0 < port < first_used for port in ports), "no connection takes it meanwhile"


def test_a_taken_port_is_told_with_its_holder(taken: str) -> None:
    free = check_address("x", "127.0.0.1:0")
    with pytest.raises(ConfigError) as caught:
        resolve_addresses(serve_config(http=taken, grpc=free, control="127.0.0.1:0"))
    assert caught.value.message.startswith(f"cannot listen on router.http {taken} (in use by ")
    assert caught.value.message.endswith("choose another with --set router.http=HOST:PORT (port 0: any free one)")
    assert listening_process(split_address(taken)[1]) is not None


def test_every_taken_port_is_told(taken: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_addresses(serve_config(http=taken, grpc=taken, control="127.0.0.1:0"))
    assert [line.split()[3] for line in caught.value.message.splitlines()] == ["router.http", "router.grpc"]


def test_one_address_for_two_things() -> None:
    free = check_address("x", "127.0.0.1:0")
    with pytest.raises(ConfigError, match=r"router\.http and router\.grpc are both"):
        resolve_addresses(serve_config(http=free, grpc=free, control="127.0.0.1:0"))


def test_an_address_of_another_machine() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.77:80 \(cannot assign requested address\)"):
        check_address("router.http", "192.0.2.77:80")


def test_a_container_quota_counts(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == usable_cores(tmp_path / "none")


def test_memory_is_within_the_limit_of_a_container(tmp_path: Path) -> None:
    assert usable_memory_bytes(tmp_path) >= available_memory_bytes(tmp_path) > 1 << 20, "no control group"
    (tmp_path / "memory.max").write_text("max\n")
    assert usable_memory_bytes(tmp_path) == usable_memory_bytes()
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 400000\n")
    assert usable_memory_bytes(tmp_path) == 1_000_000
    assert available_memory_bytes(tmp_path) == 700_000, "cached files can go"
