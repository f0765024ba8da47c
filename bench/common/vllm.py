"""How vLLM's CPU build is started at its best, as its documentation recommends."""

import os
from pathlib import Path

_PRELOADED = ("libtcmalloc_minimal.so.4", "libiomp5.so")


def vllm_environment(python: Path, threads: int) -> dict[str, str]:
    """Variables for vLLM in the environment of `python`: the engine gets the first `threads` cores, its scheduler's
    processes the others. A library that is not installed is not preloaded."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    found = [_find_library(name, python) for name in _PRELOADED]
    return {
        "LD_PRELOAD": ":".join(path for path in found if path),
        "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def _find_library(name: str, python: Path) -> str | None:
    folders = [python.parent.parent / "lib", Path("/usr/lib"), Path("/usr/lib/x86_64-linux-gnu")]
    return next((str(folder / name) for folder in folders if (folder / name).exists()), None)
