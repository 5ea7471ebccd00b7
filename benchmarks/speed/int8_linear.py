"""The product's int8 linear layers as a peer of one-bit layers, on processors for which oneDNN has a fast product of bytes."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from hubert_eff.quant.quantization import int8_linears
from hubert_eff.quant.runtime.int8 import ONEDNN, kernel

M = TypeVar("M", bound=nn.Module)


def with_int8_linears(module: M) -> M | None:
    """A copy of a fused module whose linear layers compute in int8; None where oneDNN has no such products."""
    return int8_linears(module) if kernel() == ONEDNN else None
