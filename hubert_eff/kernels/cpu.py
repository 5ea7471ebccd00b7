"""This machine's processor: its vendor, and the instruction sets that matter for the speed of products."""

from __future__ import annotations

import functools
import itertools
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

INTEL, AMD, ARM = "Intel", "AMD", "Arm"
UNKNOWN = "unknown"
SETS = (  # in Linux's spelling
    "avx2", "avx512bw", "avx512_vnni", "avx512_vpopcntdq", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "sve", "bf16",
)  # fmt: skip
_MARKS = {"GenuineIntel": INTEL, "AuthenticAMD": AMD, "CPU implementer": ARM}
_FACTS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Cpu:
    """A processor: vendor, model name, and the members of `SETS` that it has."""

    vendor: str
    name: str
    sets: tuple[str, ...]


def _described(text: str, otherwise: str) -> Cpu:
    """The processor that /proc/cpuinfo describes; `otherwise` is the system's own description, used if there is no vendor."""
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
    """The processor of this process. On other systems than Linux, sets are unknown and the vendor follows from the name."""
    try:
        with _FACTS.open(encoding="utf-8", errors="replace") as lines:  # the first core only, since all cores of a large machine take long
            text = "".join(itertools.takewhile(str.strip, lines))
    except OSError:
        text = ""
    return _described(text, f"{platform.processor()} {platform.machine()}".strip())
