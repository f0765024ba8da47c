"""Tells a process from a later one with the same pid."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_STARTED_FIELD = 19  # of /proc/PID/stat, counted from the state


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """`started_ticks` since the boot `boot_id`: the kernel gives no two processes the same pid in the same tick."""

    pid: int
    started_ticks: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity | None":
        """None if there is no such process, or only its exit status is left."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            boot_id = _BOOT_ID.read_text().strip()
        except OSError:
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[_STARTED_FIELD]), boot_id)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ProcessIdentity":
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def is_alive(self) -> bool:
        return ProcessIdentity.of(self.pid) == self
