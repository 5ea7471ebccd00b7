"""Linear layers in int8 by oneDNN: weights with a scale per output, inputs quantized per tensor as they come, both symmetric.

The fastest int8 product that torch 2.8 has for processors with VNNI or AMX, `torch.ops.onednn.qlinear_pointwise`, as a peer of one-bit
layers. It takes float32 or bfloat16 and returns the same.
"""

# M rows, K inputs, N outputs

from __future__ import annotations

import copy
import functools
from typing import Any, TypeVar

import torch
from harness import seconds
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
LEVELS = 127


class Int8Linear(nn.Module):
    """x (..., K) -> (..., N), the product of a linear layer in int8."""

    def __init__(self, source: nn.Linear, zero: int) -> None:
        super().__init__()
        weight = source.weight.detach().float()
        self.size = weight.abs().amax(1).clamp(min=1e-12) / LEVELS  # (N,)
        codes = (weight / self.size.unsqueeze(1)).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self.zeros = torch.zeros(weight.size(0), dtype=torch.int64)
        self.bias = None if source.bias is None else source.bias.detach().float()
        self.zero, self.dtype = zero, torch.uint8 if zero else torch.int8

    def forward(self, x: Tensor) -> Tensor:
        low, high = torch.aminmax(x)
        scale = max(-float(low), float(high), 1e-12) / LEVELS
        codes = torch.add(torch.tensor(float(self.zero)), x, alpha=1 / scale).round_().to(self.dtype)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, scale, self.zero, self.packed, self.size, self.zeros, self.bias, 1.0, 0, x.dtype, "none", [], ""
        )
        return y


@functools.cache
def zero_point() -> int | None:
    """The code of 0 with which oneDNN is fast on this processor: of int8 inputs, or of uint8 ones; None without such products.

    Without instructions for a type oneDNN runs its reference code, hundreds of times slower.
    """
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return None
    x, layer = torch.randn(64, 256), nn.Linear(256, 256)
    times = {}
    for zero in (0, 128):
        try:
            small = Int8Linear(layer, zero)
            small(x)
            times[zero] = min(seconds(lambda small=small: small(x)) for _ in range(5))  # type: ignore[misc]
        except RuntimeError:
            continue
    return min(times, key=lambda zero: times[zero]) if times else None


def with_int8_linears(module: M) -> M | None:
    """A copy of a fused module whose linear layers compute in int8; None where oneDNN has no such products."""
    zero = zero_point()
    return None if zero is None else _replace(copy.deepcopy(module), zero)


def _replace(module: Any, zero: int) -> Any:
    if isinstance(module, nn.Linear):
        return Int8Linear(module, zero)
    for name, child in module.named_children():
        setattr(module, name, _replace(child, zero))
    return module
