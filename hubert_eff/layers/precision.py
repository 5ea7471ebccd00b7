"""Sums, counts and products of sizes do not fit into half precision: float16 ends at 65,504, bfloat16 counts to 256."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
