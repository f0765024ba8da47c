"""The folder of a cluster that outlives the terminal: all that its controller must know after a restart.

    lock            held by the controller while it lives, so there is one at most
    desired.json    what should run; written before anything is done
    run.json        the controller's process and addresses; not valid once that process has ended
    processes/      one file for each process that runs
    s               the socket to which the processes return
    logs/           of the controller and of each process; they stay when the cluster has ended

The folder and its files are for this user alone: they hold the cluster token.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tandem.core.errors import ConfigError, UnavailableError
from tandem.deploy.desired import Desired
from tandem.deploy.private_file import make_private_folder, write_private
from tandem.deploy.process_records import ProcessRecords
from tandem.deploy.run_state import RunState, is_alive, read_run

_LONGEST_SOCKET_PATH = 107
_NAME = re.compile(r"[A-Za-z0-9._-]{1,32}")


class ClusterFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"

    @classmethod
    def of_name(cls, clusters: Path, name: str) -> "ClusterFolder":
        """Raises ConfigError for a name that no folder can have."""
        if not _NAME.fullmatch(name) or name.startswith("."):
            raise ConfigError(f"'{name}' is not a name of a cluster; use letters, digits, '-' and '_', 32 at most")
        return cls(clusters / name)

    @property
    def name(self) -> str:
        return self.path.name

    def make(self) -> None:
        """Raises ConfigError."""
        if len(os.fsencode(self.path / "s")) > _LONGEST_SOCKET_PATH:
            raise ConfigError(
                f"the path {self.path} is too long for a socket in it; set TANDEM_STATE_DIR to a shorter one"
            )
        for folder in (self.path, self.logs, self._processes):
            make_private_folder(folder)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Raises UnavailableError while a controller lives."""
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UnavailableError(f"the cluster '{self.name}' has a controller already") from error
            yield

    def load_desired(self) -> Desired | None:
        """None if the cluster has ended, or was never started. Raises ConfigError for a file of another version."""
        try:
            return Desired.from_json(json.loads((self.path / "desired.json").read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.path / 'desired.json'} cannot be read ({error}); end the cluster with: tandem down --name "
                f"{self.name}"
            ) from error

    def save_desired(self, desired: Desired) -> None:
        write_private(self.path / "desired.json", desired.to_json())

    def live_run(self) -> RunState | None:
        """The controller, if it lives."""
        run = self.last_run()
        return run if run is not None and is_alive(run) else None

    def last_run(self) -> RunState | None:
        """The controller that was here last, whether it lives or not."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return read_run(self.path / "run.json")
        return None

    def save_run(self, run: RunState) -> None:
        write_private(self.path / "run.json", asdict(run))

    def records(self) -> ProcessRecords:
        return ProcessRecords(self._processes)

    def clear(self) -> None:
        """The cluster has ended: only its logs stay."""
        for name in ("desired.json", "run.json", "s"):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self._processes, ignore_errors=True)

    @property
    def _processes(self) -> Path:
        return self.path / "processes"
