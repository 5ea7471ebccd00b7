"""Dropout that draws from 16-bit slices of random words, on a CPU several times as fast as one Bernoulli draw per element."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .linear import takes_onednn

LEVELS = 1 << 16


def keep_signs(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """A CPU float tensor that is negative with probability q and otherwise positive, and 1 / (1 - q); q is `p` rounded to 1 / 65536."""
    count = math.prod(shape)
    dropped = min(round(p * LEVELS), LEVELS - 1)
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None)
    levels = words.view(torch.int16)[:count].float().add_(LEVELS / 2 - dropped + 0.5)  # never zero
    return levels.view(shape), LEVELS / (LEVELS - dropped)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        signs, scale = keep_signs(x.shape, p)
        factor = signs.clamp_(0.0, 0.5).mul_(2.0 * scale)  # 0 or scale: the levels are half integers
        ctx.save_for_backward(factor)
        return x * factor

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grad * factor, None


class Dropout(nn.Dropout):
    """`nn.Dropout`, faster in training on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input  # the input may be packed bits
        if self.p > 0.0 and takes_onednn(input, input):
            return _Dropout.apply(input, self.p)  # type: ignore[no-any-return,no-untyped-call]
        return super().forward(input)
