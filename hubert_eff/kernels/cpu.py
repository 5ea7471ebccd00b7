"""This machine's processor: who made it, and which of its instruction sets decide how fast products are."""

from __future__ import annotations

import functools
import itertools
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

INTEL, AMD, ARM = "Intel", "AMD", "Arm"
UNKNOWN = "unknown"
SETS = (  # as Linux writes them
    "avx2", "avx512bw", "avx512_vnni", "avx512_vpopcntdq", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "sve", "bf16",
)  # fmt: skip
_MARKS = {"GenuineIntel": INTEL, "AuthenticAMD": AMD, "CPU implementer": ARM}
_FACTS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Cpu:
    """A processor: its vendor, its model's name, and which of `SETS` it has."""

    vendor: str
    name: str
    sets: tuple[str, ...]


def _described(text: str, otherwise: str) -> Cpu:
    """The processor that /proc/cpuinfo describes; `otherwise`: what the system says of it where that has no vendor."""
    fields: dict[str, str] = {}
    for key, colon, value in (line.partition(":") for line in text.splitlines()):
        if colon:
            fields.setdefault(key.strip(), value.strip())
    marks = (fields.get("vendor_id", ""), *fields, otherwise)
    vendor = next((vendor for mark, vendor in _MARKS.items() if any(mark in said for said in marks)), None)
    if vendor is None:
        vendor = ARM if any(name in otherwise.lower() for name in ("arm", "aarch64")) else UNKNOWN
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return Cpu(vendor, fields.get("model name") or otherwise, _of(flags))


def _of(flags: Iterable[str]) -> tuple[str, ...]:
    found = set(flags)
    return tuple(name for name in SETS if name in found)


@functools.cache
def cpu() -> Cpu:
    """The processor of this process. Where the system does not describe it (not Linux): no sets, and a vendor by its name."""
    try:
        with _FACTS.open(encoding="utf-8", errors="replace") as lines:  # of the first core: a large machine takes long to tell of all
            text = "".join(itertools.takewhile(str.strip, lines))
    except OSError:
        text = ""
    return _described(text, f"{platform.processor()} {platform.machine()}".strip())
