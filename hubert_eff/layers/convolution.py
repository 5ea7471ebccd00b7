"""Convolution over time in the (B, T, C) layout: as a 2-D convolution on a channels-last view, nothing is transposed in memory."""

# B batch, T frames, C input and N output channels, k kernel

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .chunks import Chunks
from .linear import linear, product, takes_onednn


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int = 0, groups: int = 1) -> Tensor:
    """x (B, T, C), weight (N, C / groups, k) -> (B, T', N)."""
    grid = x.transpose(1, 2).unsqueeze(2)  # (B, C, 1, T)
    y = F.conv2d(grid, weight.unsqueeze(2), bias, stride=(1, stride), padding=(0, padding), groups=groups)
    return y.squeeze(2).transpose(1, 2)


class _StridedConv(torch.autograd.Function):
    """Forward as `convolve`; backward as matrix products of windows, several times faster than the convolution's own on long input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return convolve(x, weight, None, stride)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        x, stride = x.contiguous(), ctx.stride
        (batch, length, channels), (out, _, kernel), frames = x.shape, weight.shape, grad.size(1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            by_tap = weight.transpose(1, 2).reshape(out, kernel * channels)
            taps = product(grad.contiguous(), by_tap.t()).view(batch, frames, kernel, channels)
            grad_x = x.new_zeros(x.shape)
            apart = min(kernel, stride)  # so many taps of neighbouring frames do not overlap
            place = (length * channels, stride * channels, channels, 1)
            grad_x.as_strided((batch, frames, apart, channels), place).copy_(taps[:, :, :apart])
            for tap in range(apart, kernel):
                grad_x[:, tap : tap + stride * (frames - 1) + 1 : stride] += taps[:, :, tap]
        windows = x.as_strided((batch, frames, kernel * channels), (length * channels, stride * channels, 1))
        windows = windows.reshape(-1, kernel * channels)
        grad_weight = product(grad.reshape(-1, out).t(), windows.t()).view(out, kernel, channels).transpose(1, 2)
        return grad_x, grad_weight, None


def strided_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """x (B, T, C), weight (N, C, k) -> (B, (T - k) // stride + 1, N), without padding."""
    if weight.size(2) == 1 and stride == 1:
        return linear(x, weight.squeeze(2), bias)
    if torch.is_grad_enabled() and takes_onednn(x, weight) and weight.requires_grad:
        y: Tensor = _StridedConv.apply(x, weight, stride)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias
    return convolve(x, weight, bias, stride)


class DepthwiseConv(nn.Module):
    """Depthwise convolution with zero padding, (B, T, C) -> (B, ceil(T / stride), C).

    At stride 1 the kernel is centred, or ends at its frame if `causal`; above it begins there: output t sees inputs t * stride ...
    t * stride + k - 1.
    """

    def __init__(self, channels: int, kernel: int, bias: bool = False, stride: int = 1, causal: bool = False) -> None:
        super().__init__()
        self.stride, self.causal = stride, causal
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor, chunks: Chunks | None = None) -> Tensor:
        """`chunks`: zeros in the place of what lies behind the chunk of a frame."""
        channels, _, kernel = self.weight.shape
        if self.stride == 1:
            before, after = (kernel - 1, 0) if self.causal else (kernel // 2, kernel // 2)
        else:
            before, after = 0, kernel - self.stride + -x.size(1) % self.stride
        if chunks is not None:
            y = convolve(chunks.windows(self, x, before, after), self.weight, self.bias, self.stride, 0, channels)
            return chunks.joined(y, x.size(0), -(-x.size(1) // self.stride))
        if before == after:
            return convolve(x, self.weight, self.bias, 1, before, channels)
        return convolve(F.pad(x, (0, 0, before, after)), self.weight, self.bias, self.stride, 0, channels)
