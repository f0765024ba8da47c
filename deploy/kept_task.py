"""Background work of a controller that must not end unseen."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

_AGAIN_S = 1.0


def keep(name: str, work: Callable[[], Coroutine[Any, Any, None]], say: Callable[[str], None]) -> asyncio.Task[None]:
    """A task that does `work`, again after an error, of which `say` gets a line. Cancel it in the end."""

    async def work_again() -> None:
        while True:
            try:
                return await work()
            except Exception as error:  # noqa: BLE001 - whatever it is
                with contextlib.suppress(OSError):  # the terminal may be gone
                    say(f"  {name} failed ({type(error).__name__}: {error}); it begins again")
            await asyncio.sleep(_AGAIN_S)

    return asyncio.create_task(work_again(), name=name)


async def cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Returns when all have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
