"""A worker whose steps hang while a file `NAME.hang` is beside its configuration `NAME.yaml`. Only its steps hang."""

import sys
import time
from pathlib import Path
from typing import Any

from tandem.engine.engine import Engine
from tandem.engine.step import SequenceSlice, StepHandle
from tandem.worker.process import run_from_command_line


def main() -> int:
    switch = Path(sys.argv[sys.argv.index("--config") + 1]).with_suffix(".hang")
    launch = Engine.launch

    def launch_when_allowed(self: Engine, slices: list[SequenceSlice], *rest: Any) -> StepHandle:
        while switch.exists():
            time.sleep(0.01)
        return launch(self, slices, *rest)

    Engine.launch = launch_when_allowed  # type: ignore[method-assign]
    return run_from_command_line("tests.cluster.hanging_worker")


if __name__ == "__main__":
    sys.exit(main())
