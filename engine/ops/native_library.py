"""Compiles the C++ kernels in `engine/native` for this machine, once, and loads them.

There is no build step: the first engine compiles the library (about ten seconds), and later engines find it in the
cache folder. The file's name is a hash of everything that the library depends on: sources, flags, compiler, processor.
Without a working compiler `load_native_library` raises `NativeUnavailableError`, and the caller computes with torch.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tandem.core.home_folder import home_folder

_SOURCE_DIR = Path(__file__).resolve().parent.parent / "native"
_MAIN_SOURCE = "api.cpp"
_COMPILERS = ("g++", "clang++")
# Hidden visibility separates the kernels of two builds in one process. -fno-math-errno lets the compiler use the square
# root instruction. -w because GCC 12 warns about its own headers.
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
    "-pthread",
    "-w",
)
_COMPILE_TIMEOUT_S = 300.0
_SCRATCH = "compiling-"


class NativeUnavailableError(Exception):
    """The kernels cannot be used; the message gives the reason."""


def load_native_library(cache_dir: Path | None = None, machine_flags: tuple[str, ...] | None = None) -> ctypes.CDLL:
    """The compiled kernels with declared argument types. Compiles the library if the cache folder does not have it.

    `cache_dir` defaults to $XDG_CACHE_HOME/tandem or ~/.cache/tandem, or to one for temporary files where this process
    cannot write there. `machine_flags` are the compiler flags for the processor, by default this machine's; tests
    choose older processors. If two processes start together, one compiles and the other waits. Raises
    NativeUnavailableError.
    """
    compiler = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise NativeUnavailableError("no C++ compiler was found (g++ or clang++)")
    try:
        flags = (*_FLAGS, *(machine_flags or (_machine_flag(),)), *_tile_flags())
        name = f"native-{_fingerprint(compiler, flags)}.so"
        folder = cache_dir or _cache_folder(name)
        _make_private(folder)
        target = folder / name
        if not target.exists():
            with _locked(folder / "compile.lock"):
                if not target.exists():
                    _compile(compiler, flags, target)
        if target.stat().st_uid != os.getuid():
            raise NativeUnavailableError(f"{target} belongs to another user")
        library = ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailableError(f"the kernels could not be compiled or loaded: {error}") from error
    _declare(library)
    return library


def _machine_flag() -> str:
    return "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


def _tile_flags() -> tuple[str, ...]:
    """Asks Linux for the tile registers of AMX, which a process has to do before it uses them: arch_prctl(2) with
    ARCH_REQ_XCOMP_PERM and the number of the registers' state. Where it refuses, the kernels do without them."""
    if b"amx_bf16" not in _processor():
        return ()
    libc = ctypes.CDLL(None, use_errno=True)
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    is_permitted = libc.syscall(arch_prctl, request_permission, tile_data) == 0
    return () if is_permitted else ("-mno-amx-tile",)


def _usual_cache_folder() -> Path | None:
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "tandem"
    home = home_folder()
    return None if home is None else home / ".cache" / "tandem"


def _cache_folder(name: str) -> Path:
    """The usual one, unless it lacks the library `name` and cannot get it: a home folder may be read-only."""
    if (usual := _usual_cache_folder()) is not None:
        with suppress(OSError):
            usual.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (usual / name).exists() or os.access(usual, os.W_OK):
            return usual
    temporary = Path(tempfile.gettempdir()) / f"tandem-cache-{os.getuid()}"
    if temporary.is_symlink():
        raise NativeUnavailableError(f"the cache folder {temporary} is a link, which others may have made")
    return temporary


def _make_private(folder: Path) -> None:
    """Libraries in this folder are executed, so other users must not be able to write to it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = folder.stat()
    if state.st_uid != os.getuid():
        raise NativeUnavailableError(f"the cache folder {folder} belongs to another user")
    if state.st_mode & 0o022:
        folder.chmod(0o700)


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for source in sorted(_SOURCE_DIR.iterdir()):
        if source.suffix in (".h", ".cpp"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30.0).stdout
    for part in (compiler.encode(), version, " ".join(flags).encode(), _processor()):
        digest.update(part + b"\0")
    return digest.hexdigest()[:24]


def _processor() -> bytes:
    """The processor's features, which -march=native depends on: machines may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    wanted = (b"model name", b"flags", b"Features", b"CPU part")
    return b"\n".join(sorted({line for line in lines if line.startswith(wanted)}))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also when the process dies
        yield


def _compile(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    """Writes to a temporary name and renames the file, so that a library under its final name is always complete. The
    caller holds the folder's lock, so other temporary names are those of processes that were killed."""
    for left in target.parent.glob(f"{_SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=target.parent) as scratch:
        output = Path(scratch) / target.name
        command = [compiler, *flags, str(_SOURCE_DIR / _MAIN_SOURCE), "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)
        if result.returncode != 0:
            first_line = next((line for line in result.stderr.splitlines() if "error" in line), "no message")
            raise NativeUnavailableError(f"{Path(compiler).name} failed on the kernels: {first_line}")
        output.replace(target)


def _declare(library: ctypes.CDLL) -> None:
    """Argument types, as in engine/native/api.cpp: p pointer, i int, n int64, f float."""
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int, "n": ctypes.c_int64, "f": ctypes.c_float}
    signatures = {
        "tandem_create": "i",
        "tandem_destroy": "p",
        "tandem_instructions": "",
        "tandem_pack": "pinnp",
        "tandem_linear": "pppiinnpnp",
        "tandem_embedding": "ppnpinp",
        "tandem_rms_norm": "ppppifnnp",
        "tandem_add_layer_norm": "pppppifnnp",
        "tandem_rope_and_cache": "ppnppppinnnnnppif",
        "tandem_attention": "ppnpinnnnnpppnnfnp",
        "tandem_all_reduce": "pnppnnnnpn",
        "tandem_send": "pnpnnpn",
        "tandem_receive": "pnpnnpn",
        "tandem_copy_pieces": "ppppnn",
        "tandem_encode_kv": "iippnnnn",
        "tandem_decode_kv": "iippnnnn",
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes = [types[letter] for letter in arguments]
        function.restype = None
    library.tandem_create.restype = ctypes.c_void_p
    library.tandem_instructions.restype = ctypes.c_char_p
    for name in ("tandem_linear", "tandem_attention", "tandem_encode_kv", "tandem_decode_kv"):
        getattr(library, name).restype = _completed
    for name in ("tandem_all_reduce", "tandem_send", "tandem_receive"):
        getattr(library, name).restype = ctypes.c_int


def _completed(result: int) -> None:
    """Checks the result of a library function. Raises MemoryError."""
    if result:
        raise MemoryError("A native kernel has no memory for its working data")
