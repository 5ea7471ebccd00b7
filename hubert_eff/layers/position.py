"""Positional embeddings."""

# B batch, T frames, D model dim

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PositionalConv1d(nn.Module):
    """Grouped convolution over time with weight normalisation per tap (wav2vec 2.0, section 2); (B, D, T) -> (B, D, T).

    Parameters carry fairseq's names: the weight is `weight_g * weight_v / |weight_v|`, the norm over all but the tap dimension.
    """

    def __init__(self, dim: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight_v = nn.Parameter(torch.empty(dim, dim // groups, kernel))
        self.weight_g = nn.Parameter(torch.empty(1, 1, kernel))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.weight_v, std=math.sqrt(4.0 / (kernel * dim)))
        with torch.no_grad():
            self.weight_g.copy_(self.norm())

    def norm(self) -> Tensor:
        """|weight_v| per tap, (1, 1, k)."""
        norm: Tensor = torch.linalg.vector_norm(self.weight_v, dim=(0, 1), keepdim=True)
        return norm

    @property
    def weight(self) -> Tensor:
        """The normalised weight, (D, D / groups, k)."""
        return self.weight_v * (self.weight_g / self.norm())

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight_v.size(-1)
        return F.conv1d(F.pad(x, (kernel // 2, (kernel - 1) // 2)), self.weight, self.bias, groups=self.groups)


def relative_sinusoids(frames: int, dim: int, like: Tensor) -> Tensor:
    """Sinusoids of the offsets T-1 .. -(T-1), (2T - 1, D), in the dtype and on the device of `like` (Transformer-XL, section 3.3)."""
    offsets = torch.arange(frames - 1, -frames, -1, device=like.device, dtype=torch.float32)
    rates = torch.exp(torch.arange(0, dim, 2, device=like.device, dtype=torch.float32) * (-math.log(10_000.0) / dim))
    angles = offsets[:, None] * rates  # (2T - 1, D / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :dim].to(like.dtype)
