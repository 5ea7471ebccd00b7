"""Optimizers and learning rate schedules that the encoders are trained with."""

from .fused_adam import FusedAdam
from .scaled_adam import ScaledAdam
from .schedules import eden, noam

__all__ = ["FusedAdam", "ScaledAdam", "eden", "noam"]
