"""Which GPUs each process of this machine has. Ray does the same for processes that it starts."""

import os

from tandem.core.errors import UnavailableError

_HUNDREDTHS = 100


class DeviceShares:
    """Devices by the names that CUDA_VISIBLE_DEVICES takes; each is given away in hundredths."""

    def __init__(self, devices: int, visible: str | None = None) -> None:
        """`visible`: this process's own CUDA_VISIBLE_DEVICES, of which the processes get a part."""
        names = [name.strip() for name in visible.split(",")] if visible else [str(n) for n in range(devices)]
        self._free = dict.fromkeys(names[:devices], _HUNDREDTHS)
        self._taken: dict[str, dict[str, int]] = {}

    @classmethod
    def of_this_machine(cls, devices: int) -> "DeviceShares":
        return cls(devices, os.environ.get("CUDA_VISIBLE_DEVICES"))

    def take(self, key: str, gpus: float) -> list[str]:
        """Whole devices, or a share below 1 of the device with the most room. Raises UnavailableError."""
        needed = round(gpus * _HUNDREDTHS)
        share = min(needed, _HUNDREDTHS)
        most_room = sorted(self._free, key=lambda name: -self._free[name])
        chosen = [name for name in most_room if self._free[name] >= share][: -(-needed // _HUNDREDTHS)]
        if len(chosen) * _HUNDREDTHS < needed:
            raise UnavailableError(f"{gpus:g} GPUs are needed, and {len(chosen)} are free")
        self.take_again(key, gpus, chosen)
        return chosen

    def take_again(self, key: str, gpus: float, devices: list[str]) -> None:
        """What a process of an earlier controller has."""
        share = min(round(gpus * _HUNDREDTHS), _HUNDREDTHS)
        self._taken[key] = {name: share for name in devices if name in self._free}
        for name in self._taken[key]:
            self._free[name] -= share

    def give_back(self, key: str) -> None:
        """No effect for a key that has nothing."""
        for name, share in self._taken.pop(key, {}).items():
            self._free[name] += share
