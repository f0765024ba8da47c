"""Where rank 0 waits for the ranks of other hosts. It listens until all are there, and then not any more.

accept thread      one thread a connection, for the handshake -> `on_host`, `on_rank`
"""

import contextlib
import logging
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from tandem.core.address import split_address
from tandem.core.errors import ConfigError
from tandem.core.parallel import RankHosts
from tandem.worker.ranks.channel import FrameKind, RankChannel
from tandem.worker.ranks.joining import TICKET_BYTES, HostTicket, JoinRequest, Purpose, admit

log = logging.getLogger(__name__)

_MAX_HANDSHAKES = 64  # at once; whoever comes beyond that tries again


@dataclass(frozen=True, slots=True)
class JoinedRank:
    """A rank on the host `host`, with its two connections."""

    rank: int
    host: str
    channel: RankChannel
    kv: socket.socket


class RankListener:
    """`on_host(channel, address)` is called for each host that joins, `on_rank` for each of its ranks, from several
    threads. Hosts get their ranks in the order in which they come."""

    def __init__(
        self,
        address: str,
        token: str,
        hosts: RankHosts,
        on_host: Callable[[RankChannel, str], None],
        on_rank: Callable[[JoinedRank], None],
    ) -> None:
        self._address = address
        self._token = token
        self._hosts = hosts
        self._on_host = on_host
        self._on_rank = on_rank
        self._lock = threading.Lock()
        self._host_of_ticket: dict[bytes, int] = {}
        self._half_joined: dict[tuple[int, Purpose], socket.socket] = {}
        self._missing = set(range(hosts.per_host[0], hosts.shape.num_ranks))
        self._handshakes = threading.BoundedSemaphore(_MAX_HANDSHAKES)
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Raises ConfigError if the address cannot be had."""
        host, port = split_address(self._address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=_MAX_HANDSHAKES)
        except OSError as error:
            reason = f"rank 0 cannot listen on {self._address} ({error.strerror}); see ranks.listen"
            raise ConfigError(reason) from error
        threading.Thread(target=self._accept, args=(self._socket,), name="rank-joins", daemon=True).start()
        log.info("waiting for %d more hosts at %s", len(self._hosts.per_host) - 1, self._address)

    def close(self) -> None:
        """Nobody joins any more."""
        with self._lock:
            listener, self._socket = self._socket, None
            for connection in self._half_joined.values():
                connection.close()
            self._half_joined.clear()
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the accept thread
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, (host, *_) = listener.accept()
            except OSError:
                if self._socket is None:
                    return
                log.exception("a connection of a rank could not be accepted")
                continue
            if not self._handshakes.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._admit, args=(connection, host), name="rank-join", daemon=True).start()

    def _admit(self, connection: socket.socket, host: str) -> None:
        try:
            request = admit(connection, self._token)
        finally:
            self._handshakes.release()
        if request is None:
            log.warning("refused a connection from %s to the ranks: it does not know the cluster_token", host)
            connection.close()
        elif request.purpose is Purpose.HOST:
            self._admit_host(RankChannel(connection), host)
        else:
            self._admit_rank(request, connection, host)

    def _admit_host(self, channel: RankChannel, host: str) -> None:
        with self._lock:
            number = len(self._host_of_ticket) + 1
            is_wanted = number < len(self._hosts.per_host)
            ticket = HostTicket(secrets.token_bytes(TICKET_BYTES), number, self._hosts)
            if is_wanted:
                self._host_of_ticket[ticket.ticket] = number
        if not is_wanted:
            log.warning("refused host %s: all %d hosts of the instance are there", host, len(self._hosts.per_host))
            with contextlib.suppress(OSError):
                channel.send(FrameKind.FAILED, b"all hosts of the instance are there already")
            channel.close()
            return
        log.info("host %s has joined, with ranks %s", host, list(self._hosts.ranks_of(number)))
        self._on_host(channel, host)
        with contextlib.suppress(OSError):  # a host that is gone is found by the end of its channel
            channel.send(FrameKind.ASSIGN, ticket.to_bytes())

    def _admit_rank(self, request: JoinRequest, connection: socket.socket, host: str) -> None:
        """A rank is there when both of its connections are."""
        key = request.rank, request.purpose
        with self._lock:
            number = self._host_of_ticket.get(request.ticket)
            is_wanted = (
                number is not None
                and request.rank in self._hosts.ranks_of(number)
                and request.rank in self._missing
                and key not in self._half_joined
            )
            if is_wanted:
                self._half_joined[key] = connection
            pair = [self._half_joined.get((request.rank, purpose)) for purpose in (Purpose.RANK, Purpose.KV)]
            frames, kv = pair
            is_whole = is_wanted and frames is not None and kv is not None
            if is_whole:
                self._half_joined = {at: value for at, value in self._half_joined.items() if at[0] != request.rank}
                self._missing.remove(request.rank)
            are_all_there = not self._missing
        if not is_wanted:
            log.warning("refused a connection from %s for rank %d: nobody waits for it", host, request.rank)
            connection.close()
        if is_whole:
            assert frames is not None
            assert kv is not None
            self._on_rank(JoinedRank(request.rank, host, RankChannel(frames), kv))
        if are_all_there:
            self.close()
