"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, at and beyond the limits of every shape."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


def _run(cache: Path, what: str, flags: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is needed")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("g++ has no sanitizers")
    # Python itself does not free everything; and torch throws where the library has to be found first.
    environment = {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "tests.engine.sanitized_kernels", str(cache), what, *flags]
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "flags",
    [
        ("-march=native",),
        ("-march=x86-64-v3",),
        ("-march=x86-64-v2",),
        ("-march=native", "-DTANDEM_EMULATE_BF16_DOT"),
        ("-march=native", "-DTANDEM_EMULATE_TILES", "-DTANDEM_EMULATE_BF16_DOT"),
    ],
    ids=["this-cpu", "avx2", "sse", "bf16-dot", "tiles"],
)
def test_kernels_stay_inside_their_memory(flags: tuple[str, ...], tmp_path: Path) -> None:
    if flags == ("-march=native",):
        fault = _run(tmp_path, "fault", flags)
        assert "AddressSanitizer: heap-buffer-overflow" in fault.stderr  # it would be found
    result = _run(tmp_path, "all", flags)
    assert result.returncode == 0, result.stderr[:3000]
    assert int(result.stdout) > 2000
