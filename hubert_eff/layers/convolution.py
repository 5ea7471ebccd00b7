"""Convolution over time inside an encoder block."""

# B batch, T frames, C channels, k kernel

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DepthwiseConv(nn.Module):
    """Depthwise convolution of (B, T, C) with centred kernel and zero padding; (B, T, C) -> (B, T, C).

    It runs as a 2-D convolution on a channels-last view, so that the (B, T, C) layout is never transposed in memory.
    """

    def __init__(self, channels: int, kernel: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        channels, _, kernel = self.weight.shape
        grid = x.transpose(1, 2).unsqueeze(2)  # (B, C, 1, T), channels last
        y = F.conv2d(grid, self.weight.unsqueeze(2), self.bias, padding=(0, kernel // 2), groups=channels)
        return y.squeeze(2).transpose(1, 2)
