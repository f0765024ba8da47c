"""What a controller must know of its running processes to take them back after its own end: one file for each.

A record is written once its process is ready, and removed when the process has ended. It holds the process's whole
configuration with the cluster token, so only this user may read it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tandem.deploy.hosted_process import config_from_json
from tandem.deploy.private_file import write_private
from tandem.deploy.process_identity import ProcessIdentity
from tandem.deploy.topology import ProcessRole, ProcessSpec


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """`key` is what the process calls itself when it returns; `devices` are the GPUs that it has."""

    spec: ProcessSpec
    key: str
    identity: ProcessIdentity
    address: str
    instance_id: str
    devices: tuple[int | str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "role": spec.role.value,
            "index": spec.index,
            "entry": spec.entry,
            "config_class": type(spec.config).__name__,
            "config": spec.config.model_dump(mode="json"),
            "threads": spec.threads,
            "gpus": spec.gpus,
            "shares_cores": spec.shares_cores,
            "key": self.key,
            "identity": asdict(self.identity),
            "address": self.address,
            "instance_id": self.instance_id,
            "devices": list(self.devices),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ProcessRecord":
        """Raises ValueError, KeyError or TypeError for the record of another version."""
        spec = ProcessSpec(
            ProcessRole(fields["role"]),
            fields["index"],
            fields["entry"],
            config_from_json(fields),
            fields["threads"],
            fields["gpus"],
            fields["shares_cores"],
        )
        identity = ProcessIdentity(**fields["identity"])
        address, instance_id = fields["address"], fields["instance_id"]
        return cls(spec, fields["key"], identity, address, instance_id, tuple(fields["devices"]))


class ProcessRecords:
    """The records in `folder`, which exists. Only the controller writes them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, record: ProcessRecord) -> None:
        write_private(self._file(record.spec.name), record.to_json())

    def remove(self, name: str) -> None:
        self._file(name).unlink(missing_ok=True)

    def load(self) -> list[ProcessRecord]:
        """Of processes that still run. The other records are removed."""
        found = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                record = ProcessRecord.from_json(json.loads(path.read_text()))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # of another version: its process is forgotten, and ends when it returns
            if record.identity.is_alive:
                found.append(record)
            else:
                path.unlink(missing_ok=True)
        return found

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"
