"""Addresses of the form host:port in configuration files and messages."""

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from tandem.core.errors import ConfigError

ANY_HOSTS = ("0.0.0.0", "::")
"""Hosts that stand for all interfaces of a machine."""
_LAST_PORT = 65535
_HOST_NAME = re.compile(r"[\w.-]+")


def split_address(address: str) -> tuple[str, int]:
    """host:port -> (host, port); an IPv6 address is in brackets there, and without them here. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if (mistake := _mistake(address, host, port)) is not None:
        raise ConfigError(f"'{address}' is not an address of the form host:port{mistake}")
    return host.strip("[]"), int(port)


def _mistake(address: str, host: str, port: str) -> str | None:
    """What follows the sentence that it is no address."""
    if "://" in address:
        return "; leave out what is before the host"
    if address.startswith(("/", "unix:")):
        return "; Unix sockets are not supported"
    if ":" not in address or address.endswith("]"):
        return ""
    if not host:
        return f"; 127.0.0.1:{port} is of this machine alone, 0.0.0.0:{port} of all its interfaces"
    if not (port.isascii() and port.isdigit()):
        return f"; '{port}' is no port"
    if len(port) > 5 or int(port) > _LAST_PORT:
        return f"; a port is at most {_LAST_PORT}"
    if host.startswith("[") and host.endswith("]"):
        return None if _is_ipv6(host[1:-1]) else f"; {host} is no IPv6 address"
    if ":" in host:
        return f"; write [{host}]:{port}" if _is_ipv6(host) else "; it has one colon, or an IPv6 address in brackets"
    return None if _HOST_NAME.fullmatch(host) else f"; '{host}' is no name of a host"


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches host:port."""
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_any_host(address: str) -> bool:
    """Whether the host stands for all interfaces, so that no other machine can connect to the address as it is."""
    host, _ = split_address(address)
    return host in ANY_HOSTS


def advertised(address: str, host: str | None) -> str:
    """`address` as other machines reach it: with the name `host` in place of its host, if that is not None."""
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


def _check_host(value: str) -> str:
    if not (_is_ipv6(value) or _HOST_NAME.fullmatch(value)):
        raise ValueError(f"'{value}' is not a host: a name or an IP address, without a port")
    return value


Address = Annotated[str, BeforeValidator(_check_address)]
Host = Annotated[str, AfterValidator(_check_host)]
"""Without a port: a name, or an IP address without brackets."""
