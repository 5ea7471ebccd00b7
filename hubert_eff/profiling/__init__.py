"""Parameters, storage, operations by bit width, and time: counted, estimated from a device's rates, or measured."""

from __future__ import annotations

from .cost import ModuleCost, Profile, profile
from .counters import Counts, Tally, count_operations
from .device import Device, list_devices, read_device
from .formulas import register_formula

__all__ = [
    "Counts", "Device", "ModuleCost", "Profile", "Tally", "count_operations", "list_devices", "profile", "read_device",
    "register_formula",
]  # fmt: skip
