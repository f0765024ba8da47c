"""A rank as a child process of the process that has its host's ranks: rank 0, or `tandem ranks` on another host."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tandem.core.log_lines import configured_format
from tandem.core.parent_process import end_with_parent

_ADOPTION_S = 10.0


@dataclass(frozen=True, slots=True)
class RankFiles:
    """What a rank has from its parent: the folder of the model, and descriptors. `channel` is the connection to rank 0,
    `region` the memory that the ranks of its host share, and `pool` the file of its KV pool. On the host of rank 0 also
    `store`, which is that of `MeetingPlace`. `kv` is the connection over which rank 0 reads and writes KV where it
    cannot map the pool: on other hosts, and on GPUs."""

    model: str
    channel: int
    region: int
    pool: int
    store: int | None = None
    kv: int | None = None

    @property
    def fds(self) -> list[int]:
        return [fd for fd in (self.channel, self.region, self.pool, self.store, self.kv) if fd is not None]


def start_rank(files: RankFiles) -> subprocess.Popen[bytes]:
    """On the main thread: the kernel ends the rank with the thread that started it."""
    fields = {"files": asdict(files), "parent": os.getpid(), "log_format": configured_format()}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "tandem.worker.ranks.follower", json.dumps(fields)],
        pass_fds=files.fds,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


def be_a_rank(argument: str) -> tuple[RankFiles, str] | None:
    """In the child: what it has, and the format of its log lines. From then on it ends with its parent; None if that
    has ended already."""
    fields = json.loads(argument)
    if not end_with_parent(fields["parent"], _ADOPTION_S):
        return None
    return RankFiles(**fields["files"]), fields["log_format"]


class StoppedTimes:
    """For how long processes have been stopped, to somebody who looks at them every `every_s`.

    A look that is late may be late because the observer was stopped as well, or had no core. So no more than twice that
    time counts between two looks: a busy machine makes the count slower, and never begins it anew. A look that follows
    the one before at once is none.
    """

    def __init__(self, every_s: float) -> None:
        self._least_s, self._most_s = every_s / 2, 2 * every_s
        self._looked_s: float | None = None
        self._times: dict[int, float] = {}
        self.observed_s = 0.0  # that counts, since the first look

    def look(self, pids: Iterable[int], now_s: float) -> None:
        since_s = 0.0 if self._looked_s is None else min(now_s - self._looked_s, self._most_s)
        if self._looked_s is not None and since_s < self._least_s:
            return
        self._looked_s = now_s
        self.observed_s += since_s
        self._times = {pid: self._times.get(pid, -since_s) + since_s for pid in pids if is_stopped(pid)}

    def of(self, pid: int) -> float:
        """Since the first look that found it stopped; 0 for a process that runs."""
        return self._times.get(pid, 0.0)


def is_stopped(pid: int) -> bool:
    """By a signal, or by a debugger. False for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in "Tt"
