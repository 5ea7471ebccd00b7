"""LayerNorm and softmax that stay finite in half precision (Xu et al. 2024, "Conformer-Based Speech Recognition on Extreme Edge-Computing
Devices", section 4). Every element-wise value has the dtype of the input; torch itself adds up half-precision values in float32.

Bounds are those of float16 for every dtype, so a float32 graph stays finite when a compiler runs it in half precision.
"""

# B batch, T frames, C channels

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..layers.tracing import is_tracing

M = TypeVar("M", bound=nn.Module)

UNIT = 2.0**-11  # unit roundoff of float16
LARGEST = torch.finfo(torch.float16).max
SOFTMAX_LIMIT = 10.0


def largest_deviation(channels: int) -> float:
    """The bound D on the values of `mad_normalize`: with |z| <= D the squares of C values sum up to at most 2 D^2, which must fit.

    A centered vector divided by its mean absolute value has |z| <= C / 2, and its squares sum up to at most C^2 / 2 (two opposite values
    and zeros); this fits into float16 only for C <= 361.
    """
    return min(channels / 2, math.sqrt(LARGEST / 2) * (1 - 2**-6))  # with a margin for rounding


def mad_normalize(x: Tensor, deviation: float | None = None, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Compute z = (x - mean) 2 D / (C mad) over a dimension of C, where mad = mean |x - mean|, and the factor by which x grew.

    No intermediate value exceeds the range of float16 if x does not. `deviation` is D; None stands for C / 2, plain MAD. A constant vector
    becomes zeros.
    """
    channels = int(x.size(dim))
    scale = 1.0 if deviation is None else 2.0 * deviation / channels
    y = x * 0.5  # the difference of two finite values may overflow; halves of them may not
    y = y - y.mean(dim, keepdim=True)
    y = y - y.mean(dim, keepdim=True)  # rounding of the first mean may exceed the deviations if these are small in comparison
    # large enough to keep sqrt(eps) * factor finite; a larger divisor only makes z smaller
    mad = y.abs().mean(dim, keepdim=True).clamp(min=4.0 / LARGEST)
    return (y / mad) * scale, 0.5 * scale / mad


def mad_layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, bounded: bool = True, dim: int = -1
) -> Tensor:  # fmt: skip
    """LayerNorm over a dimension of C with the mean-absolute-deviation pre-normalizer; `bounded`: with the bound D.

    LayerNorm does not change when its input is scaled, if eps is scaled as well. In float16 the result differs from float64's by at most
    4 u (1 + |result| + |mean| / deviation), u = 2^-11, before weight and bias.
    """
    z, factor = mad_normalize(x, largest_deviation(int(x.size(dim))) if bounded else None, dim)
    variance = (z * z).sum(dim, keepdim=True) / int(x.size(dim))
    shift = (factor * math.sqrt(eps)).clamp(max=math.sqrt(LARGEST) / 2)
    y = z / (variance + shift * shift).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def naive_layer_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm by its definition, with every value in the dtype of x (..., C): the form that overflows."""
    y = x - x.mean(-1, keepdim=True)
    return y / ((y * y).sum(-1, keepdim=True) / x.size(-1) + eps).sqrt()


class MadLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` through `mad_layer_norm`, with the same parameters."""

    def forward(self, input: Tensor, valid: Tensor | None = None) -> Tensor:
        """(..., C) -> (..., C); `valid` is accepted as by norms of a batch, and ignored."""
        return mad_layer_norm(input, self.weight, self.bias, self.eps)


def half_precision(model: M) -> M:
    """A copy in float16 whose LayerNorms have the pre-normalizer; eval mode."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = MadLayerNorm
    return model.half()


def conditional_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension (..., keys); a row is shifted by its maximum only if one of its scores is beyond the limit.

    The limit is 10, or lower where exp(limit) times the number of keys would leave the range of float16: log(65504 / keys).
    """
    if is_tracing():  # the number of keys is unknown
        keys = scores.new_ones(scores.shape[-1:], dtype=torch.float32).sum()
        limit: Tensor | float = (LARGEST / keys).log().clamp(max=SOFTMAX_LIMIT).to(scores.dtype)
    else:
        limit = min(SOFTMAX_LIMIT, math.log(LARGEST / scores.size(-1)))
    beyond = scores.abs().amax(-1, keepdim=True) > limit
    top = scores.amax(-1, keepdim=True)
    weights = torch.where(beyond, scores - top, scores).exp()
    return weights / weights.sum(-1, keepdim=True)
