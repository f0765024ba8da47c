"""`python -m tests.chaos.controlled_worker --config FILE`: a worker whose steps and address a test controls.

`FILE.steps` says what the next steps do; without it they run as they are:

    sleep S    each step takes S seconds more, so that phases last as long as a test needs
    hang       a step does not end while the file says so; everything else of the process goes on
    fail       each step raises RuntimeError, as torch does
    no memory  each step of more than one sequence raises MemoryError
    corrupt    steps run as they are; one bit of all KV that leaves over gloo is another one

While `FILE.kv` says "hold", nobody is told of KV that is here, and the connections go on: readers wait for it.

The worker reports the address in `FILE.address` instead of its own, which it writes into `FILE.own-address`.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tandem.engine.engine import Engine
from tandem.kv_transfer.process_groups import GlooGroup
from tandem.prefill_worker.held_kv import HeldKv
from tandem.worker.instance import PublicSide
from tandem.worker.process import run_from_command_line


def _control_steps(file: Path) -> None:
    launch = Engine.launch

    def controlled_launch(engine: Engine, slices: Sequence[Any], *rest: Any) -> Any:
        order, _, seconds = _read(file).partition(" ")
        if order == "fail":
            raise RuntimeError("this step fails because a test wants it to")
        if order == "no" and len(slices) > 1:
            raise MemoryError("this step finds no memory because a test wants it to")
        if order == "sleep":
            time.sleep(float(seconds))
        while order == "hang" and _read(file) == "hang":
            time.sleep(0.02)
        return launch(engine, slices, *rest)

    Engine.launch = controlled_launch  # type: ignore[method-assign]


def _corrupt_kv(file: Path) -> None:
    send = GlooGroup.send

    def corrupted_send(group: GlooGroup, data: torch.Tensor) -> Any:
        if _read(file) == "corrupt":
            data[len(data) // 2] ^= 1
        return send(group, data)

    GlooGroup.send = corrupted_send  # type: ignore[method-assign]


def _hold_kv(file: Path) -> None:
    wait = HeldKv._wait

    async def held_wait(held: HeldKv, *arguments: Any) -> Any:
        while _read(file) == "hold":  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.02)
        return await wait(held, *arguments)

    HeldKv._wait = held_wait  # type: ignore[method-assign]


def _report_address(reported: Path, own: Path) -> None:
    status = PublicSide.status

    def with_address(public: PublicSide) -> Any:
        if not own.exists():
            own.write_text(public.address)
        return replace(status(public), address=reported.read_text())

    PublicSide.status = with_address  # type: ignore[method-assign]


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    config = sys.argv[sys.argv.index("--config") + 1]
    _control_steps(Path(f"{config}.steps"))
    _corrupt_kv(Path(f"{config}.steps"))
    _hold_kv(Path(f"{config}.kv"))
    _report_address(Path(f"{config}.address"), Path(f"{config}.own-address"))
    sys.exit(run_from_command_line("tests.chaos.controlled_worker"))
