"""TLS of servers: certificates that are read again when their files change.

gRPC and HTTP take the files' content at each new connection; connections that are open stay.
"""

import errno
import logging
import ssl
from pathlib import Path

import grpc
from cryptography import x509

from tandem.client_tls import MAX_PEM_BYTES
from tandem.core.errors import ConfigError
from tandem.core.file_watch import FileWatch
from tandem.core.input_file import read_input
from tandem.core.tls import ClusterTls, PublicTls

_LOG = logging.getLogger(__name__)


class ServerTls:
    """What one server shows, and whose certificates its clients need. Use it after `load`.

    `not_after_s` is when the first certificate of the file `certificate` expires, in seconds since 1970; None: unknown.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self.certificate = certificate
        self.not_after_s: float | None = None
        self._key = key
        self._client_ca = client_ca
        self._context: ssl.SSLContext | None = None
        self._configuration: grpc.ServerCertificateConfiguration | None = None

    @classmethod
    def of_clients(cls, settings: PublicTls) -> "ServerTls":
        return cls(settings.certificate, settings.key, settings.client_ca)

    @classmethod
    def of_cluster(cls, settings: ClusterTls) -> "ServerTls":
        return cls(settings.certificate, settings.key, settings.ca)

    def load(self) -> None:
        """Raises ConfigError for files that are missing or do not fit together; what was loaded before stays."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            pair = _read(self._key), _read(self.certificate)
            ca = None if self._client_ca is None else _read(self._client_ca)
            context.load_cert_chain(self.certificate, self._key)
            if self._client_ca is not None:
                context.load_verify_locations(self._client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
                # A session that is resumed would keep a client whose authority is no longer trusted.
                context.options |= ssl.OP_NO_TICKET
                context.num_tickets = 0
        except (OSError, ssl.SSLError) as error:  # an SSLError is an OSError with other texts
            files = ", ".join(str(path) for path in (self.certificate, self._key, self._client_ca) if path)
            raise ConfigError(f"the files of TLS cannot be used: {files} ({error.strerror or error})") from error
        self._context = context
        self.not_after_s = _first_expiry_s(pair[1])
        self._configuration = grpc.ssl_server_certificate_configuration([pair], ca)

    def grpc_credentials(self) -> grpc.ServerCredentials:
        now = self._grpc_configuration
        return grpc.dynamic_ssl_server_credentials(
            now(), now, require_client_authentication=self._client_ca is not None
        )

    def _grpc_configuration(self) -> grpc.ServerCertificateConfiguration:
        """Called by gRPC's threads, for each connection."""
        assert self._configuration is not None, "load first"
        return self._configuration

    def http_context(self) -> ssl.SSLContext:
        """For HTTP/1.1. The context of the moment, for one connection."""
        assert self._context is not None, "load first"
        return self._context

    async def reload_when_changed(self) -> None:
        """Until cancelled. Files that cannot be used change nothing, and the log says so."""
        watch = FileWatch([path for path in (self.certificate, self._key, self._client_ca) if path])
        while True:
            await watch.wait_for_change()
            try:
                self.load()
                _LOG.info("the certificate %s has been read again", self.certificate)
            except ConfigError as error:
                _LOG.error("the certificate stays as it was: %s", error.message)


def _read(path: Path) -> bytes:
    """Raises OSError; of what OpenSSL, which opens the file again, would never read to an end, too."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, f"{path} is not a regular file")
    return read_input(path, MAX_PEM_BYTES)


def _first_expiry_s(pem: bytes) -> float | None:
    """Of a certificate and those between it and its authority. None if their dates cannot be read: OpenSSL, which has
    read them, takes more than `cryptography` does."""
    try:
        return min(each.not_valid_after_utc.timestamp() for each in x509.load_pem_x509_certificates(pem))
    except ValueError:
        return None
