"""Convolution over time in the (B, T, C) layout: a 2-D convolution on a channels-last view, without transposing memory."""

# B batch, T frames, C input and N output channels, k kernel

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .chunks import Chunks
from .linear import linear, product, takes_onednn
from .tracing import is_exporting

NARROW, KERNELS = range(2, 16, 2), 32  # channels per group, and divisor of the kernel, for which bfloat16 needs a zero tap


def _computes_in(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution of x runs, with or without autocast."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def with_zero_tap(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Extend x (B, C, ..., T) and weight (N, C / groups, ..., k) of a convolution over time by a zero if only then the result is right.

    On CPUs with AMX, oneDNN (3.7, as in torch 2.8) returns noise for bfloat16, an even number of channels per group below 16 and a kernel
    that is a multiple of 32. A zero tap does not change the result. Shape and dtype decide, not the machine, so that all machines compute
    the same; nothing changes for other dtypes, devices and shapes. Every grouped convolution of this package passes through here.
    """
    if x.device.type != "cpu" or _computes_in(x) != torch.bfloat16 or weight.size(1) not in NARROW or weight.size(-1) % KERNELS:
        return x, weight
    return F.pad(x, (0, 1)), F.pad(weight, (0, 1))


class GroupedConv2d(nn.Conv2d):
    """`nn.Conv2d` that is also right in bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, N, F', T')."""
        x, weight = with_zero_tap(input, self.weight)
        y: Tensor = self._conv_forward(x, weight, self.bias)
        return y


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int = 0, groups: int = 1) -> Tensor:
    """x (B, T, C), weight (N, C / groups, k) -> (B, T', N)."""
    grid, kernels = with_zero_tap(x.transpose(1, 2).unsqueeze(2), weight.unsqueeze(2))  # (B, C, 1, T), (N, C / groups, 1, k)
    y = F.conv2d(grid, kernels, bias, stride=(1, stride), padding=(0, padding), groups=groups)
    return y.squeeze(2).transpose(1, 2)


class _StridedConv(torch.autograd.Function):
    """Runs `convolve` forward, and backward matrix products of windows, several times as fast on long input as the convolution's own."""

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
            apart = min(kernel, stride)  # the number of taps of neighboring frames that do not overlap
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


def reach(kernel: int, stride: int, causal: bool, frames: int) -> tuple[int, int]:
    """How many frames before and after its input a `DepthwiseConv` sees."""
    if stride > 1 and is_exporting():
        return 0, kernel - 1  # for any length; up to stride - 1 more frames give as many outputs
    if stride > 1:
        return 0, max(0, kernel - stride + -frames % stride)
    return (kernel - 1, 0) if causal else (kernel // 2, kernel // 2)


class DepthwiseConv(nn.Module):
    """Depthwise convolution with zero padding, (B, T, C) -> (B, ceil(T / stride), C).

    At stride 1 the kernel is centered, or ends at its frame if `causal`. At larger strides it begins there: output t sees inputs
    t * stride ... t * stride + k - 1.
    """

    def __init__(self, channels: int, kernel: int, bias: bool = False, stride: int = 1, causal: bool = False) -> None:
        super().__init__()
        self.stride, self.causal = stride, causal
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor, chunks: Chunks | None = None) -> Tensor:
        """Convolve; with `chunks`, a frame sees zeros beyond the end of its chunk."""
        channels, _, kernel = self.weight.shape
        before, after = reach(kernel, self.stride, self.causal, x.size(1))
        if chunks is not None:
            y = chunks.convolved(self, x, before, after, lambda w: convolve(w, self.weight, self.bias, self.stride, 0, channels))
            return y[:, : -(-x.size(1) // self.stride)]
        if before == after:
            return convolve(x, self.weight, self.bias, 1, before, channels)
        return convolve(F.pad(x, (0, 0, before, after)), self.weight, self.bias, self.stride, 0, channels)
