"""Quantizers of one and more bits (Liu et al. 2022, "BiT", section 2), in a form that a bit-packed runtime can match exactly.

A quantized tensor is a * codes with one learned scale a. A quantizer returns the codes, so that products first sum integers and then
multiply by all scales: this order of arithmetic is the same with +-1 in floats and with packed bits. Gradients are those of
y = a * codes, g = dL/dy, once the caller's product has multiplied by a:

    signed    q = x / a
              1 bit   q > 0 ? 1 : -1            dL/dx = g 1[|q| <= 1]          dL/da = sum g sign(x) / n^0.5
              more    clamp(round(q), -P, Q)    dL/dx = g 1[-P <= q <= Q]      dL/da = sum g {-P below, Q above, round(q) - q} / (n Q)^0.5
                      P = 2^(bits - 1), Q = P - 1
    unsigned  q = (x - z) / a, Q = 2^bits - 1; at 1 bit z = 0, and the bit is x > a / 2
                      clamp(round(q), 0, Q) + z / a
                                                dL/dx = g 1[0 <= q <= Q]       dL/da = sum g {0 below, Q above, round(q) - q} / (n Q)^0.5

n counts the elements that are not padding. Every bit is a `>`: nothing has the sign 0. Scales and the sums of their gradients are float32
at least, whatever the dtype of x: float16 can hold neither n nor a sum over n elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layers.precision import wide
from ..layers.tracing import is_tracing

FLOOR = 1e-5  # the least scale


def signed_range(bits: int) -> tuple[int, int]:
    """The least and the greatest signed code; at one bit, which has no code 0, they bound the range with gradient."""
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


class _Signed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.bits = bits
        if bits == 1:
            return (x > 0).to(x.dtype).mul_(2).sub_(1)
        return (x / scale).round_().clamp_(*signed_range(bits)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, scale = ctx.saved_tensors
        grad = grad / scale  # dL/dy
        if ctx.bits == 1:  # only the product has a gradient for a
            return grad.masked_fill(x.abs() > scale, 0.0).to(x.dtype), None, None
        q = x / scale
        low, high = signed_range(ctx.bits)
        grad = grad.masked_fill((q < low) | (q > high), 0.0)
        return grad.to(x.dtype), -(grad * q).sum().view_as(scale), None


class _Unsigned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bits: int, offset: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, scale, offset)
        ctx.bits = bits
        if bits == 1:
            return (x > scale / 2).to(x.dtype)
        assert offset is not None
        return (((x - offset) / scale).round_().clamp_(0, 2**bits - 1) + offset / scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale, offset = ctx.saved_tensors
        grad = grad / scale
        q = (x if offset is None else x - offset) / scale
        inside = grad.masked_fill((q < 0) | (q > 2**ctx.bits - 1), 0.0)
        of_scale = (inside * q).sum()
        if offset is not None:
            of_scale = of_scale + (grad * (offset / scale)).sum()  # z is constant, so its share of the product's gradient is removed
        return inside.to(x.dtype), -of_scale.view_as(scale), None, None


def signed_codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of x in {-1, 1}, or with more bits in `signed_range`; scale (1,)."""
    if bits == 1 and is_tracing():  # plain operations, since a trace misses what a Function changes in place
        return (x > 0).to(x.dtype) * 2 - 1
    return _Signed.apply(x, scale, bits)  # type: ignore[no-any-return,no-untyped-call]


def unsigned_codes(x: Tensor, scale: Tensor, bits: int, offset: Tensor | None = None) -> Tensor:
    """Codes of x in {0, 1}, or with more bits in {0 ... 2^bits - 1} + offset / scale; scale (1,); offset: the minimum z, broadcast to x."""
    if bits == 1 and is_tracing():
        return (x > scale / 2).to(x.dtype)
    return _Unsigned.apply(x, scale, bits, None if offset is None else offset.detach())  # type: ignore[no-any-return,no-untyped-call]


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return scale.clamp(min=FLOOR)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grad * factor, None


def effective_scale(scale: Tensor, count: Tensor | int, levels: int) -> Tensor:
    """The scale, at least `FLOOR`; its gradient is divided by sqrt(count * levels) (and passes the floor, so that it can recover)."""
    scale = wide(scale)
    if not torch.is_grad_enabled():
        return scale.clamp(min=FLOOR)
    if isinstance(count, int):  # filled by a kernel, because a copy to a GPU would wait
        count = torch.full((), count, device=scale.device)
    factor = count.to(scale.dtype).clamp(min=1).mul(levels).rsqrt()
    return _Scale.apply(scale, factor)  # type: ignore[no-any-return,no-untyped-call]


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(sums, factor)
        return (sums * factor).to(sums.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        sums, factor = ctx.saved_tensors
        return (grad * factor).to(sums.dtype), (wide(grad) * sums).sum_to_size(factor.shape)


def scaled(sums: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """sums * factor in a model with parameters of `dtype`; in half precision the factor and the sum for its gradient are float32.

    `factor` broadcasts to `sums`.
    """
    if dtype in (torch.float16, torch.bfloat16):
        return _Scaled.apply(sums, factor)  # type: ignore[no-any-return,no-untyped-call]
    return sums * factor


def initial_scale(mean: Tensor | float, signed: bool, levels: int) -> Tensor | float:
    """The initial scale, from the mean of |x|."""
    root: float = levels**0.5
    return (2 if signed else 4) * mean / root


class _Signs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, center: Tensor, size: Tensor) -> Tensor:
        ctx.save_for_backward(size)
        return (weight > center).to(weight.dtype).mul_(2).sub_(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (size,) = ctx.saved_tensors
        return (grad / size).to(grad.dtype), None, None


def weight_signs(weight: Tensor, per_channel: bool, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Signs of a weight (N, ...) and their scale m, (N,) or (1,): m sign(W - e), with the straight-through estimator as gradient of W.
    The scale is float32 at least.

    m = mean |W| and e = mean(W) over the whole tensor; with `per_channel`, m is per output channel. With groups e is too, except that the
    channels of a depthwise convolution (one input channel per group) are not centered, which would remove the DC of a smoothing filter.
    """
    if weight.is_meta:  # only the shapes: torch would import for seconds to infer that of a mean
        return weight, torch.empty(weight.size(0) if per_channel else 1, device="meta")
    with torch.no_grad():
        rows = wide(weight.flatten(1))
        size = rows.abs().mean(1) if per_channel else rows.abs().mean().view(1)
        size = size.clamp(min=FLOOR)
        shape = (-1, *(1,) * (weight.dim() - 1))
        if per_channel and groups > 1:
            depthwise = weight.size(1) == 1
            center = torch.zeros_like(size) if depthwise else rows.mean(1)
        else:
            center = rows.mean().view(1)
    if is_tracing():
        return (weight > center.view(shape)).to(weight.dtype) * 2 - 1, size
    signs: Tensor = _Signs.apply(weight, center.view(shape), size.view(shape))  # type: ignore[no-untyped-call]
    return signs, size
