"""Optimizers and learning rate schedules for training the encoders."""

from .fused_adam import FusedAdam
from .scaled_adam import ScaledAdam
from .schedules import eden, noam

__all__ = ["FusedAdam", "ScaledAdam", "eden", "noam"]
