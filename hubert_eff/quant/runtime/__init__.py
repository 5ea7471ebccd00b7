"""Runs packed bits: C++ kernels that are compiled at first use, or plain torch if there are none."""

from __future__ import annotations

from ...kernels.loader import KERNELS, kernel_in_use

__all__ = ["KERNELS", "kernel_in_use"]
