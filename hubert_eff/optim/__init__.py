"""Optimizer and learning rate schedules that the encoders' papers train with."""

from .scaled_adam import ScaledAdam
from .schedules import eden, noam

__all__ = ["ScaledAdam", "eden", "noam"]
