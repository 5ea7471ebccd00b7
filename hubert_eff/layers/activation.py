"""Activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), of a tensor that nobody else reads: without gradient it is overwritten, which saves the pages of a second one."""
    return F.silu(x, inplace=not torch.is_grad_enabled())
