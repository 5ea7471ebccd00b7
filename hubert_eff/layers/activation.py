"""Activations that torch lacks or computes more slowly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x). Nobody else may read x: without gradient it is overwritten, which saves the memory of a second tensor."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def relu(x: Tensor) -> Tensor:
    """max(x, 0), overwriting x likewise: the activation before a layer with a binarized input."""
    return F.relu(x, inplace=not torch.is_grad_enabled())


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function of x, overwriting x likewise."""
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


SLOPE = 0.08  # magnitude of the slope of both Swoosh functions on the far left


def _swoosh(x: Tensor, shift: float, offset: float) -> Tensor:
    z = x - shift
    return F.softplus(z).add_(z, alpha=-SLOPE).sub_(offset + SLOPE * shift)


class _Swoosh(torch.autograd.Function):
    """Keeps only its input; the derivative is sigmoid(x - shift) - 0.08."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: float, offset: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shift = shift
        return _swoosh(x, shift, offset)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return (x - ctx.shift).sigmoid_().sub_(SLOPE).mul_(grad), None, None


def _apply(x: Tensor, shift: float, offset: float) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Swoosh.apply(x, shift, offset)  # type: ignore[no-any-return,no-untyped-call]
    return _swoosh(x, shift, offset)


def swoosh_l(x: Tensor) -> Tensor:
    """log(1 + exp(x - 4)) - 0.08 x - 0.035, element by element (Zipformer, equation 4)."""
    return _apply(x, 4.0, 0.035)


def swoosh_r(x: Tensor) -> Tensor:
    """log(1 + exp(x - 1)) - 0.08 x - 0.313261687, element by element; 0 at 0 (Zipformer, equation 4)."""
    return _apply(x, 1.0, 0.313261687)
