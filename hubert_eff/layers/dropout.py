"""Dropout that draws its mask from 16-bit slices of random words: on a CPU several times faster than one Bernoulli draw per element."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .linear import takes_onednn

LEVELS = 1 << 16


def keep_mask(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """A CPU mask, False with probability q, and 1 / (1 - q); q is `p` rounded to 1 / 65536, below 1."""
    count = math.prod(shape)
    dropped = min(round(p * LEVELS), LEVELS - 1)
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None)
    mask = words.view(torch.int16)[:count] >= dropped - LEVELS // 2
    return mask.view(shape), LEVELS / (LEVELS - dropped)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask, ctx.scale = keep_mask(x.shape, p)
        ctx.save_for_backward(mask)
        return (x * mask).mul_(ctx.scale)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return (grad * mask).mul_(ctx.scale), None


class Dropout(nn.Dropout):
    """`nn.Dropout`, faster in training on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.p > 0.0 and takes_onednn(input, input):
            return _Dropout.apply(input, self.p)  # type: ignore[no-any-return,no-untyped-call]
        return super().forward(input)
