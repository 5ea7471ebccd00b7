"""Compiles the kernels once per machine, loads them, and chooses the fastest kernel that this processor can run.

The library goes into `$XDG_CACHE_HOME/hubert-eff` (default ~/.cache), named after its sources, its compiler, the processor's family and
its own content; it holds the kernels of all instruction sets of that family. A library that another user may have written is not loaded.
The compiler is `$CXX`, or the first of g++, clang++ and c++ that is installed. `$HUBERT_EFF_KERNEL` forces a kernel: one of `KERNELS`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, unknown
from ..utils.files import replacing

VARIABLE = "HUBERT_EFF_KERNEL"
TORCH = "torch"
AMX, POPCOUNT = "amx", "avx512vpopcntdq"
KERNELS = (
    AMX,
    POPCOUNT,
    "avx512bw",
    "avx2",
    "neon",
    TORCH,
)  # the fastest first; the last always runs and defines the results of all
TILED_ROWS, TILED_INPUTS = (
    16,
    128,
)  # smaller products are as fast with popcounts: a tile has 16 rows, and its sums cost as much as 64 inputs
SOURCE = Path(__file__).with_name("kernels.cpp")
SOURCES = (SOURCE, *sorted(SOURCE.parent.glob("*.h")))
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-pthread")  # no fused multiply-add: torch rounds twice
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
DIMS = 3
LONG, POINTER = ctypes.c_int64, ctypes.c_void_p
_lock = threading.Lock()  # otherwise threads of one process would write the same temporary file


def _structure(name: str, pointers: str, sizes: str, strides: str = "", last: str = "", end: str = "") -> type[ctypes.Structure]:
    fields: list[tuple[str, Any]] = [(field, POINTER) for field in pointers.split()]
    fields += [(field, LONG * DIMS) for field in strides.split()]
    fields += [(field, LONG) for field in sizes.split()]
    fields += [(field, POINTER) for field in last.split()]
    fields += [(field, LONG) for field in end.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# layouts as in pack.h, product.h, depthwise.h, columns.h and attention.h
Pack = _structure("Pack", "x move factor limit", "columns", "size x_stride move_stride factor_stride", "out", "half before words")
Product = _structure("Product", "a b scale size bias limit out", "batch m n k words sizes is_signed half")
Depthwise = _structure(
    "Depthwise", "x valid weight scale size bias out", "batch frames channels words kernel stride begin end sizes is_signed half"
)
Join = _structure("Join", "kept more out", "panels frames surplus words more_words out_words")
Attention = _structure(
    "Attention", "q keys shared seen shared_seen p offsets cost threshold out",
    "batch heads blocks n key_count shared_count words inputs position_words start window by_query",
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """The functions of one instruction set."""

    name: str
    library: ctypes.CDLL
    functions: int


def _compiler() -> list[str] | None:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in ([named] if named else []) + [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    return None


def _folders() -> list[Path]:
    """Folders for the library: the user's cache, and temporary files. A folder that another user can write to or replace is left out."""
    places = [Path(tempfile.gettempdir()) / f"hubert-eff-{os.geteuid()}"]
    with suppress(RuntimeError):  # no such user
        places.insert(0, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hubert-eff")
    folders = []
    for place in places:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.mkdir(mode=0o700, exist_ok=True)
            folder = place.resolve()
            if folder.stat().st_uid == os.geteuid() and folder.stat().st_mode & WRITABLE_BY_OTHERS:  # made by an earlier version
                folder.chmod(0o700)
            shared = [stat.S_IWOTH & mode and not stat.S_ISVTX & mode for mode in (parent.stat().st_mode for parent in folder.parents)]
            if _is_trusted(folder.stat()) and os.access(folder, os.R_OK | os.X_OK) and not any(shared):
                folders.append(folder)
    return folders


def _is_trusted(found: os.stat_result) -> bool:
    """Whether only this user and root can have written a file or folder."""
    return found.st_uid in (os.geteuid(), 0) and not found.st_mode & WRITABLE_BY_OTHERS


def _is_whole(library: Path) -> bool:
    """Whether a cached library was written by this user or root and matches the digest in its name. Loading half a library, as a full disk
    or a crash of the machine may leave it, would end the process."""
    try:
        with library.open("rb") as stream:
            content = stream.read() if _is_trusted(os.fstat(stream.fileno())) else b""
    except OSError:
        return False
    return library.stem.endswith(f"-{hashlib.sha256(content).hexdigest()}")


def compile_library() -> Path:
    """The compiled library, from the cache if possible. Raises `RuntimeError` with one line if it cannot be compiled."""
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler was found (install g++ or clang++, or set CXX)")
    try:
        program = Path(shutil.which(compiler[0]) or "").resolve().stat()  # to ask for its version takes longer than all else here
        made_by = repr((compiler, program.st_size, program.st_mtime_ns, FLAGS, platform.machine())).encode()
        key = hashlib.sha256(b"\0".join([*(source.read_bytes() for source in SOURCES), made_by]))
        folders, stem = _folders(), f"kernels-{key.hexdigest()[:20]}"
        for found in (file for folder in folders for file in folder.glob(f"{stem}-*.so")):
            if _is_whole(found):
                return found
        with tempfile.TemporaryDirectory() as work:
            made = Path(work) / "kernels.so"
            command = [*compiler, *FLAGS, "-o", str(made), str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, timeout=600)
            content = made.read_bytes()
        folder = next((f for f in folders if os.access(f, os.W_OK)), None) or Path(tempfile.mkdtemp(prefix="hubert-eff-"))
        for found in folder.glob(f"{stem}*.so"):
            if not _is_whole(found):
                found.unlink(missing_ok=True)
        target = folder / f"{stem}-{hashlib.sha256(content).hexdigest()}.so"
        with replacing(target) as temporary:  # two processes may do this at once; each renames a complete file
            temporary.write_bytes(content)
        target.chmod(0o700)  # whatever the umask is
        return target
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or b"").decode(errors="replace").strip().splitlines() or [f"exit code {error.returncode}"]
        said = next((line for line in lines if "error" in line), lines[-1])
        raise RuntimeError(f"{compiler[0]} failed: {said}") from error
    except (OSError, RuntimeError, UserError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"the kernels could not be compiled: {' '.join(str(error).split())}") from error


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    with _lock:
        try:
            library = ctypes.CDLL(str(compile_library()))
        except (RuntimeError, OSError) as error:
            return " ".join(str(error).split())
    library.hubert_eff_find.argtypes, library.hubert_eff_find.restype = [ctypes.c_char_p], POINTER
    library.hubert_eff_pack.argtypes = [POINTER, POINTER, LONG, LONG]
    library.hubert_eff_product.argtypes = [POINTER, POINTER, LONG]
    library.hubert_eff_depthwise.argtypes = [POINTER, POINTER, LONG]
    library.hubert_eff_attention.argtypes = [POINTER, POINTER, LONG]
    library.hubert_eff_join_columns.argtypes = [POINTER]
    for name in ("pack", "product", "depthwise", "attention", "join_columns"):
        getattr(library, f"hubert_eff_{name}").restype = None
    return library


@functools.cache
def _load(name: str) -> Kernel | str:
    """A kernel by name, or the reason why it does not run here."""
    library = _library()
    if isinstance(library, str):
        return library
    functions = library.hubert_eff_find(name.encode())
    return Kernel(name, library, functions) if functions else f"this processor ({platform.machine()}) cannot run it"


@functools.cache
def _best() -> Kernel | None:
    kernels = [_load(name) for name in KERNELS if name != TORCH]
    found = next((kernel for kernel in kernels if isinstance(kernel, Kernel)), None)
    if found is None:
        warnings.warn(f"one-bit layers run in plain torch, slower than float ones: {absence()}", stacklevel=2)
    return found


def absence() -> str | None:
    """The reason why no kernel runs here; None if one does."""
    library = _library()
    if isinstance(library, str):
        return library
    none = "this processor has none of the instruction sets " + ", ".join(KERNELS[:-1])
    return None if any(isinstance(_load(name), Kernel) for name in KERNELS[:-1]) else none


def current() -> Kernel | None:
    """The kernel to use; None for plain torch. Raises `UserError` for a forced kernel that is unknown or does not run here."""
    name = os.environ.get(VARIABLE, "")
    if not name:
        return _best()
    if name not in KERNELS:
        raise unknown(f"kernel in {VARIABLE}", name, KERNELS)
    if name == TORCH:
        return None
    kernel = _load(name)
    if isinstance(kernel, str):
        raise UserError(f"{VARIABLE}={name}: {kernel}; unset it to let the fastest one run")
    return kernel


def for_product(kernel: Kernel, rows: int, inputs: int) -> Kernel:
    """The kernel for a product of so many rows and inputs: with AMX it depends on the size, unless AMX is forced."""
    if kernel.name != AMX or os.environ.get(VARIABLE) == AMX or (rows >= TILED_ROWS and inputs >= TILED_INPUTS):
        return kernel
    popcount = _load(POPCOUNT)  # all processors with AMX run it; only its products differ from AMX
    return popcount if isinstance(popcount, Kernel) else kernel


def kernel_in_use() -> str:
    """The name of the kernel that one-bit layers use, one of `KERNELS`."""
    kernel = current()
    return TORCH if kernel is None else kernel.name


def described() -> dict[str, str]:
    """The kernel of each operation of one-bit layers. Raises `UserError` as `current` does."""
    kernel = current()
    if kernel is None or kernel.name != AMX:
        return {"all operations": kernel_in_use()}
    some = f"{AMX} from {TILED_ROWS} rows and {TILED_INPUTS} inputs on, else {POPCOUNT}"
    return {"products": AMX if os.environ.get(VARIABLE) else some, "packing, attention, depthwise convolutions": POPCOUNT}
