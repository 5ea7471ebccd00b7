"""Linear layers that use oneDNN's float32 product on a CPU where it is faster, forward and backward.

PyTorch's float32 linear on a CPU calls MKL, which leaves up to half of the speed unused on processors that are not Intel's; oneDNN, which
PyTorch ships for convolutions, does not. `layers.choice` decides between them. Precision and parameters are those of `nn.Linear`.
"""

# M rows, K inputs, N outputs

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import choice

_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # absent if torch is built without oneDNN


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times the transpose of weight (N, K), through oneDNN."""
    assert _PRODUCT is not None
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # on a strided slice oneDNN falls back to its reference code, hundreds of times slower
    return _PRODUCT(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.size(-1))  # (M, N)
        return (
            product(grad, weight.t()) if need_x else None,
            product(rows.t(), x.reshape(-1, x.size(-1)).t()) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether the products here apply: eager float32 on a CPU that oneDNN supports."""
    return (
        _PRODUCT is not None
        and x.dtype == torch.float32 == weight.dtype
        and x.device.type == "cpu"
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    if not takes_onednn(x, weight) or not choice.takes_product(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
    return product(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` through `linear`."""

    def fold(self) -> Linear:
        """Store the weight input by input, the order in which oneDNN reads it; without a copy per call few rows take half the time."""
        self.weight = nn.Parameter(self.weight.t().contiguous().t())
        return self

    def forward(self, input: Tensor) -> Tensor:
        if self.in_features * self.out_features < choice.chosen().least:
            return F.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)
