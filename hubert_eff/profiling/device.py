"""Devices: peak rates from a YAML file, and estimates of time from counts. These times are never measurements."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, unknown
from ..layers.bits import Bits
from ..utils.files import config_dir

PAPER_UNIT = 1024  # the paper divides 2^30 bit operations by so many per "TOP" (2^40 operations)


@dataclass(frozen=True)
class Device:
    """Peak rates of a device. `tops`: width in bits -> 10^12 operations per second (a MAC is two); memory bandwidth in 10^9 bytes/s."""

    name: str
    source: str
    tops: Mapping[int, float]
    bandwidth_gb_s: float

    def rate(self, bits: int) -> float:
        """Operations per second, in 10^12, for operands of so many bits: the rate of the fastest type of the device that holds them."""
        wide = [rate for width, rate in self.tops.items() if width >= bits]
        if not wide:
            raise UserError(f"{self.name} has no rate for operands of {bits} bits, only for {', '.join(map(str, sorted(self.tops)))}")
        return max(wide)

    def paper_time(self, bop_nonq_g: float, bop_bq_g: float) -> float:
        """Seconds by the formula behind the paper's Table 1: bit operations (in 2^30) over the rates at 16 bits and at 1 bit."""
        return bop_nonq_g / (self.rate(16) * PAPER_UNIT) + bop_bq_g / (self.rate(1) * PAPER_UNIT)

    def roofline_time(self, macs_by_bits: Mapping[Bits, int], weight_bytes: float) -> float:
        """Minimum seconds on the device: all products at peak rate or all weights read once, whichever takes longer."""
        compute = sum(2 * macs / (self.rate(max(bits)) * 1e12) for bits, macs in macs_by_bits.items())
        return max(compute, weight_bytes / (self.bandwidth_gb_s * 1e9))

    def to_dict(self) -> dict[str, Any]:
        """The content of a device file as plain values."""
        return {**dataclasses.asdict(self), "tops": dict(self.tops)}

    def to_yaml(self) -> str:
        """The content of a device file, which `read_device` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def list_devices() -> list[str]:
    """Names of the devices in configs/device."""
    return sorted(path.stem for path in (config_dir() / "device").glob("*.yaml"))


def read_device(name: str | os.PathLike[str]) -> Device:
    """Read a device of `list_devices()` by name, or any by the path of its YAML file. Raises `UserError` for other names and content."""
    path = config_dir() / "device" / f"{name}.yaml" if str(name) in list_devices() else Path(name)
    if not path.is_file():
        raise unknown("device (give one of these, or the path of a YAML file)", name, list_devices())
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {' '.join(str(error).split())[:160]}") from error
    keys = [field.name for field in dataclasses.fields(Device)]
    if not isinstance(content, dict) or set(content) != set(keys):
        raise UserError(f"{path} must have the keys {', '.join(keys)}")
    tops = content["tops"]
    if not isinstance(tops, dict) or not tops or not all(isinstance(b, int) and b > 0 and _positive(rate) for b, rate in tops.items()):
        raise UserError(f"{path}: tops must map widths in bits to rates, such as 16: 312")
    if not _positive(content["bandwidth_gb_s"]):
        raise UserError(f"{path}: bandwidth_gb_s={content['bandwidth_gb_s']!r} must be a positive number")
    return Device(str(content["name"]), str(content["source"]), tops, content["bandwidth_gb_s"])


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
