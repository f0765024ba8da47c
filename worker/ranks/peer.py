"""Another rank of the instance, as rank 0 knows it."""

from dataclasses import dataclass
from pathlib import Path

from tandem.core.errors import CheckpointError, ConfigError
from tandem.worker.ranks.channel import LoadedRank, RankChannel
from tandem.worker.ranks.child import StoppedTimes

# A rank counts as lost when its process is stopped for so long, or when it is silent for longer: a busy machine may
# leave a healthy process without a core for seconds. Of ranks on other hosts `worker.ranks.host` sees that they are
# stopped, and the kernel that their host is cut off (`joining.CUT_S`).
STOPPED_S = 0.6
SILENT_S = 10.0


@dataclass(slots=True, eq=False)
class RankPeer:
    """A rank, or the process that has started the ranks of another host (`rank` None). `pid` is that of a rank of this
    host. `heard_s`, in observed time, is None until it has loaded: until then it may be silent."""

    channel: RankChannel
    name: str
    rank: int | None = None
    pid: int | None = None
    address: str = ""  # where other hosts reach its host, if there are several
    heard_s: float | None = None
    loaded: LoadedRank | None = None

    def is_lost(self, stopped: StoppedTimes) -> bool:
        if self.heard_s is None:
            return False
        is_silent = stopped.observed_s - self.heard_s > SILENT_S
        return is_silent or (self.pid is not None and stopped.of(self.pid) >= STOPPED_S)

    def check_alike(self, own: LoadedRank, model: Path) -> None:
        """Once it has loaded, with what rank 0 has loaded. Raises CheckpointError or ConfigError: together the two
        would compute wrong tokens, or none."""
        assert self.loaded is not None
        if self.loaded.weights_hash not in ("", own.weights_hash):
            raise CheckpointError(
                f"the model files of {self.name} are not those of rank 0, in {model}: their hashes are "
                f"{self.loaded.weights_hash[:16]} and {own.weights_hash[:16]}; copy the model to that host again"
            )
        theirs, ours = (
            f"{each.dtype} with activations in {each.activation_dtype} and {each.num_blocks} blocks"
            for each in (self.loaded, own)
        )
        if theirs != ours:
            raise ConfigError(f"{self.name} has {theirs}, and rank 0 {ours}; set engine.dtype and engine.ops")
