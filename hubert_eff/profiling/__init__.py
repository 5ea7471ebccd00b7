"""Parameters, storage and operations of a model."""

from __future__ import annotations

from .cost import ModuleCost, Profile, profile
from .counters import Counts, Tally, count_operations, register_formula

__all__ = ["Counts", "ModuleCost", "Profile", "Tally", "count_operations", "profile", "register_formula"]
