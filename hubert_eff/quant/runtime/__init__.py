"""What runs packed bits: C++ kernels compiled on first use, and the same in plain torch where there are none."""

from __future__ import annotations

from ...kernels.loader import KERNELS, kernel_in_use

__all__ = ["KERNELS", "kernel_in_use"]
