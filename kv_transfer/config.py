"""Settings of a link, the same for both sides."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """`bind_host` is where gloo listens: an address that only the cluster can reach. `stall_s` and
    `min_bytes_per_s` bound each send and receive: n bytes may take stall_s + n / min_bytes_per_s.
    """

    bind_host: str = "127.0.0.1"
    max_links: int = 64
    link_timeout_s: float = 10.0
    stall_s: float = 3.0
    min_bytes_per_s: float = 10e6

    def operation_timeout_s(self, nbytes: int) -> float:
        return self.stall_s + nbytes / self.min_bytes_per_s
