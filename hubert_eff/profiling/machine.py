"""The machine on which figures are measured: its description, a check of its speed, memory, and peak rates."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ..layers.linear import linear
from .device import Device

CPU_FACTS = "/proc/cpuinfo"
PROBE_LIMIT = 12.0  # SiLU and softmax take 1 to 5 times a multiplication of the same tensor; in a slow process, 50 times and more
ALLOCATOR = ("LD_PRELOAD", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
SIZE = 2048  # size of the roofline's square matrices
COPY_BYTES = 1 << 28  # bytes of the roofline's copy, more than caches hold


class SlowProcessError(RuntimeError):
    """This process runs activations abnormally slowly, so its figures would be meaningless."""


def seconds_of(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def cpu_seconds_of(function: Callable[[], object]) -> float:
    """CPU time of one call on this thread: what one thread takes, on a machine whose cores others use too."""
    start = time.thread_time()
    function()
    return time.thread_time() - start


def busy() -> str:
    """A warning that more work runs on this machine than it has CPUs; "" if not, or if the system does not say."""
    load, cpus = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load <= cpus:
        return ""
    return f"the load of this machine is {load:.1f}, and it has {cpus} CPU{'s' * (cpus != 1)}: wall times are too long"


def probe() -> float:
    """How many times slower SiLU or softmax is than a multiplication, the worse of the two."""
    x = torch.randn(1024, 1024)
    base = min(seconds_of(lambda: x * 2.0) for _ in range(9))
    slow = [min(seconds_of(f) for _ in range(5)) for f in (lambda: F.silu(x), lambda: x.softmax(-1))]
    return max(slow) / base


def guard(when: str) -> float:
    """Run `probe`. Raises `SlowProcessError` beyond its limit."""
    ratio = probe()
    if ratio > PROBE_LIMIT:
        raise SlowProcessError(
            f"discarded: {when}, SiLU or softmax takes {ratio:.0f} times a multiplication in this process (limit {PROBE_LIMIT:g}); "
            "run again"
        )
    return ratio


def machine(device: str = "cpu") -> dict[str, Any]:
    """The conditions on which measured figures depend besides the code."""
    facts = {
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "allocator": {name: os.environ[name] for name in ALLOCATOR if name in os.environ} or "default",
    }
    return facts | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def cpu_name() -> str:
    """Return the processor's name with its family and model numbers, which tell generations of one name apart.

    Where the system does not say them, the name alone, or the architecture.
    """
    facts: dict[str, str] = {}
    try:
        with open(CPU_FACTS, encoding="utf-8") as lines:
            for line in lines:  # the first processor's come first
                key, _, value = line.partition(":")
                facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = facts.get("model name") or platform.processor() or platform.machine()
    family, model = facts.get("cpu family"), facts.get("model")
    return f"{name} (family {family}, model {model})" if family and model else name


def peak_growth(function: Callable[[], object], device: str) -> int | None:
    """Peak growth in bytes of the memory of the process, or of torch on a GPU, during a call. None if it cannot be read."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator keeps would hide the need of the call
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # resets the peak (proc(5))
        before = _status("VmRSS")
        function()
        return _status("VmHWM") - before
    except (OSError, AttributeError):  # not Linux, or not glibc
        return None


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def measure_roofline() -> Device:
    """Measure peak rates of this CPU with the current number of threads: the best of several matrix products in each type, and a copy."""
    tops = {32: _float_rate(torch.float32), 16: _float_rate(torch.bfloat16)}
    int8 = _int8_rate()
    if int8 is not None:
        tops[8] = int8
    x = torch.ones(COPY_BYTES // 4)
    y = torch.empty_like(x)
    copy = min(seconds_of(lambda: y.copy_(x)) for _ in range(5))
    source = f"measured by hubert-eff bench --roofline, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    return Device(cpu_name(), source, {bits: round(rate, 4) for bits, rate in tops.items()}, round(2 * COPY_BYTES / copy / 1e9, 2))


def _rate(product: Callable[[], object]) -> float:
    """10^12 operations per second of a product of two SIZE x SIZE matrices: the best of five, or of those within a second."""
    with torch.no_grad():
        product()
        times = [seconds_of(product)]
        while len(times) < 5 and sum(times) < 1.0:
            times.append(seconds_of(product))
        return 2 * SIZE**3 / min(times) / 1e12


def _float_rate(dtype: torch.dtype) -> float:
    x, weight = torch.randn(SIZE, SIZE).to(dtype), torch.randn(SIZE, SIZE).to(dtype)
    return _rate(lambda: linear(x, weight))


def _int8_rate() -> float | None:
    """The rate for float matrices that are quantized on the way in and out, as in dynamic quantization; None without such a kernel."""
    try:
        weight = torch.quantize_per_tensor(torch.randn(SIZE, SIZE), 0.03, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(weight, None)
        x = torch.randn(SIZE, SIZE)
        return _rate(lambda: torch.ops.quantized.linear_dynamic(x, packed, True))
    except (RuntimeError, AttributeError):
        return None
