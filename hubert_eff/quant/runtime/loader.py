"""Compile kernels.cpp once per machine, load it, and choose the fastest kernel that this processor can run.

The library goes into `$XDG_CACHE_HOME/hubert-eff` (default ~/.cache), named after its source, its compiler and the processor's family;
it holds the kernels of all instruction sets of that family. The compiler is `$CXX`, or g++, clang++ or c++, whichever there is.
`$HUBERT_EFF_KERNEL` forces a kernel: one of `KERNELS`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError, unknown
from ...files import replacing

VARIABLE = "HUBERT_EFF_KERNEL"
TORCH = "torch"
KERNELS = ("avx512vpopcntdq", "avx512bw", "avx2", "neon", TORCH)  # the fastest first; the last one always runs, and defines the others
SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-pthread")  # no fused multiply-add: torch rounds twice
DIMS = 3
LONG, POINTER = ctypes.c_int64, ctypes.c_void_p
_lock = threading.Lock()  # threads of one process would write the same temporary file


def _structure(name: str, pointers: str, sizes: str, strides: str = "", last: str = "", end: str = "") -> type[ctypes.Structure]:
    fields: list[tuple[str, Any]] = [(field, POINTER) for field in pointers.split()]
    fields += [(field, LONG * DIMS) for field in strides.split()]
    fields += [(field, LONG) for field in sizes.split()]
    fields += [(field, POINTER) for field in last.split()]
    fields += [(field, LONG) for field in end.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# as in kernels.cpp
Pack = _structure("Pack", "x move factor limit", "columns", "size x_stride move_stride factor_stride", "out", "half")
Product = _structure("Product", "a b scale size bias limit out", "batch m n k words sizes is_signed half")
Depthwise = _structure(
    "Depthwise", "x valid weight scale size bias out", "batch frames channels words kernel stride sizes is_signed half"
)


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


def _cache() -> Path:
    """Where the library is kept; a new temporary folder where that cannot be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hubert-eff"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no such user
        pass
    return Path(tempfile.mkdtemp(prefix="hubert-eff-"))


def compile_library() -> Path:
    """The compiled library, from the cache if it is there. Raises `RuntimeError`, one line, if it cannot be made."""
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler was found (install g++ or clang++, or set CXX)")
    try:
        version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
        key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, repr((compiler, FLAGS, platform.machine())).encode()]))
        target = _cache() / f"kernels-{key.hexdigest()[:20]}.so"
        if target.is_file():
            return target
        with replacing(target) as temporary:  # two processes may do this at a time: each renames a complete file
            command = [*compiler, *FLAGS, "-o", str(temporary), str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, timeout=600)
        return target
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or b"").decode(errors="replace").strip().splitlines() or [f"exit code {error.returncode}"]
        said = next((line for line in lines if "error" in line), lines[-1])
        raise RuntimeError(f"{compiler[0]} failed: {said}") from error
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"the kernels could not be compiled: {' '.join(str(error).split())}") from error


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    with _lock:
        try:
            path = compile_library()
            try:
                library = ctypes.CDLL(str(path))
            except OSError:  # a crash of the machine can leave an empty file
                path.unlink(missing_ok=True)
                library = ctypes.CDLL(str(compile_library()))
        except (RuntimeError, OSError) as error:
            return " ".join(str(error).split())
    library.hubert_eff_find.argtypes, library.hubert_eff_find.restype = [ctypes.c_char_p], POINTER
    library.hubert_eff_pack.argtypes = [POINTER, POINTER, LONG, LONG]
    library.hubert_eff_product.argtypes = [POINTER, POINTER, LONG]
    library.hubert_eff_depthwise.argtypes = [POINTER, POINTER, LONG]
    for function in (library.hubert_eff_pack, library.hubert_eff_product, library.hubert_eff_depthwise):
        function.restype = None
    return library


@functools.cache
def _load(name: str) -> Kernel | str:
    """A kernel by name, or why it does not run here."""
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
        library = _library()
        reason = library if isinstance(library, str) else "this processor has none of the instruction sets " + ", ".join(KERNELS[:-1])
        warnings.warn(f"one-bit layers run in plain torch, slower than float ones: {reason}", stacklevel=2)
    return found


def current() -> Kernel | None:
    """The kernel to use; None: plain torch. Raises `UserError` for a forced kernel that is unknown, or that does not run here."""
    name = os.environ.get(VARIABLE, "")
    if not name:
        return _best()
    if name not in KERNELS:
        raise unknown(f"kernel in {VARIABLE}", name, KERNELS)
    if name == TORCH:
        return None
    kernel = _load(name)
    if isinstance(kernel, str):
        raise UserError(f"{VARIABLE}={name}: {kernel}; unset it to run on what there is")
    return kernel


def kernel_in_use() -> str:
    """The name of the kernel that one-bit layers run on: one of `KERNELS`."""
    kernel = current()
    return TORCH if kernel is None else kernel.name
