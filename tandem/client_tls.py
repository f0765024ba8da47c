"""TLS of a gRPC client."""

from dataclasses import dataclass
from pathlib import Path

import grpc

from tandem.core.errors import ConfigError
from tandem.core.input_file import read_input

MAX_PEM_BYTES = 4 << 20  # the public authorities together have a quarter of it


@dataclass(frozen=True, slots=True)
class ClientTls:
    """PEM files. `ca`: the authorities that are trusted; None: those that gRPC brings along, or those of the variable
    GRPC_DEFAULT_SSL_ROOTS_FILE_PATH. `certificate` and `key`: what the client shows to a server that asks.
    `server_name`: the name in the server's certificate, where it is not the host of the address."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Of the files as they are now. Raises ConfigError."""
        if (self.certificate is None) is not (self.key is None):
            raise ConfigError("a client's certificate and its key go together")
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.certificate))

    def options(self) -> tuple[tuple[str, str], ...]:
        """Of a channel."""
        return () if self.server_name is None else (("grpc.ssl_target_name_override", self.server_name),)


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = read_input(path, MAX_PEM_BYTES)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    if not content:
        raise ConfigError(f"{path} is empty")  # gRPC would take that for no file at all, and trust others
    return content
