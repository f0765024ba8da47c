"""How ranks of other hosts come to rank 0: over TCP connections to an address at which rank 0 listens until all are
there. Both ends prove that they know the cluster's token, which itself does not travel:

    other host                                      rank 0
      | <-- greeting: version, nonce ---------------- |
      | -- request: purpose, rank, ticket, nonce ---> |
      | -- HMAC-SHA256 over greeting and request ---> |   a connection without the token ends here
      | <-- HMAC-SHA256 over the same, as rank 0 ---- |

Each host opens a connection with the purpose HOST, on which rank 0 tells it the numbers of its ranks and a ticket
(`HostTicket`), and with that ticket two connections for each rank: RANK for frames (`worker/ranks/channel.py`) and KV
(`worker/ranks/remote_pool.py`). What they carry is neither encrypted nor authenticated any more, like KV between hosts.
"""

import contextlib
import hmac
import json
import secrets
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

from tandem.core.address import split_address
from tandem.core.errors import ConfigError
from tandem.core.parallel import ParallelShape, RankHosts

CUT_S = 2  # after which a connection ends whose other end does not acknowledge bytes or probes
HANDSHAKE_S = 5.0
TICKET_BYTES = 16
_VERSION = 1
_MAGIC = b"TRNK"
_GREETING = struct.Struct("<4sH32s")  # magic, version, nonce
_REQUEST = struct.Struct(f"<BI{TICKET_BYTES}s32s")  # purpose, rank, ticket, nonce
_PROOF_BYTES = 32


class Purpose(IntEnum):
    HOST = 1
    RANK = 2
    KV = 3


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """`rank` and `ticket` are 0 for a host, which gets them."""

    purpose: Purpose
    rank: int = 0
    ticket: bytes = bytes(TICKET_BYTES)


@dataclass(frozen=True, slots=True)
class HostTicket:
    """What rank 0 tells a host that has joined: it is host number `host` of `hosts`."""

    ticket: bytes
    host: int
    hosts: RankHosts

    def to_bytes(self) -> bytes:
        shape = self.hosts.shape
        fields = {"ticket": self.ticket.hex(), "host": self.host, "tp": shape.tp, "pp": shape.pp}
        return json.dumps(fields | {"per_host": self.hosts.per_host}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "HostTicket":
        fields = json.loads(data)
        hosts = RankHosts(ParallelShape(fields["tp"], fields["pp"]), tuple(fields["per_host"]))
        return cls(bytes.fromhex(fields["ticket"]), fields["host"], hosts)


def join(address: str, token: str, request: JoinRequest) -> socket.socket:
    """A connection to rank 0 at `address`. Raises OSError if rank 0 cannot be reached, and ConfigError if it refuses
    this host or cannot prove itself."""
    connection = socket.create_connection(split_address(address), HANDSHAKE_S)
    try:
        greeting = _read(connection, _GREETING.size)
        magic, version, _ = _GREETING.unpack(greeting)
        if (magic, version) != (_MAGIC, _VERSION):
            raise ConfigError(f"what listens at {address} is no rank 0 of this version of tandem")
        body = _REQUEST.pack(request.purpose, request.rank, request.ticket, secrets.token_bytes(32))
        connection.sendall(body + _proof(token, b"joins", greeting, body))
        try:
            proof = _read(connection, _PROOF_BYTES)
        except EOFError as error:
            raise ConfigError(f"rank 0 at {address} refuses this host: it has another cluster_token") from error
        if not hmac.compare_digest(proof, _proof(token, b"leads", greeting, body)):
            raise ConfigError(f"what listens at {address} does not know this host's cluster_token")
        end_when_cut(connection)
    except (EOFError, TimeoutError) as error:
        connection.close()
        raise ConnectionError("the connection ended in the handshake") from error
    except BaseException:
        connection.close()
        raise
    return connection


def admit(connection: socket.socket, token: str) -> JoinRequest | None:
    """Rank 0's side, at most `HANDSHAKE_S` for each message. None for one that does not know the token, or speaks
    otherwise; the connection stays the caller's."""
    connection.settimeout(HANDSHAKE_S)
    greeting = _GREETING.pack(_MAGIC, _VERSION, secrets.token_bytes(32))
    with contextlib.suppress(OSError, EOFError, ValueError):  # it ends, stalls, or is no rank
        connection.sendall(greeting)
        data = _read(connection, _REQUEST.size + _PROOF_BYTES)
        body, proof = data[: _REQUEST.size], data[_REQUEST.size :]
        if not hmac.compare_digest(proof, _proof(token, b"joins", greeting, body)):
            return None
        connection.sendall(_proof(token, b"leads", greeting, body))
        end_when_cut(connection)
        purpose, rank, ticket, _ = _REQUEST.unpack(body)
        return JoinRequest(Purpose(purpose), rank, ticket)
    return None


def end_when_cut(connection: socket.socket) -> None:
    """The kernel ends the connection when the other host has not answered for `CUT_S`, also while nothing is sent."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, 1),
        (socket.TCP_KEEPINTVL, 1),
        (socket.TCP_KEEPCNT, CUT_S),
        (socket.TCP_USER_TIMEOUT, 1000 * CUT_S),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _proof(token: str, side: bytes, greeting: bytes, body: bytes) -> bytes:
    return hmac.digest(token.encode(), b"tandem ranks, " + side + greeting + body, "sha256")


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        got = connection.recv(count - len(data))
        if not got:
            raise EOFError
        data += got
    return data
