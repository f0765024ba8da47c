"""Addresses of the form host:port in configuration files and messages."""

import ipaddress
from typing import Annotated

from pydantic import BeforeValidator, Field

from tandem.core.errors import ConfigError

ANY_HOSTS = ("0.0.0.0", "::")
"""Of all interfaces of a machine."""


def split_address(address: str) -> tuple[str, int]:
    """host:port -> (host, port). Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
        raise ConfigError(f"'{address}' is not an address of the form host:port")
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches host:port."""
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_any_host(address: str) -> bool:
    """Whether it is of all interfaces: nobody can be told to connect there."""
    host, _ = split_address(address)
    return host in ANY_HOSTS


def advertised(address: str, host: str | None) -> str:
    """`address` (with its actual port) as others reach it: under the name `host`, if there is one."""
    if host is None:
        return address
    port = split_address(address)[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_address(value: object) -> object:
    if isinstance(value, str):
        try:
            split_address(value)
        except ConfigError as error:
            raise ValueError(error.message) from error
    return value


Address = Annotated[str, BeforeValidator(_check_address)]
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]+$")]
