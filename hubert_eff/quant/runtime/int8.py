"""Linear layers in int8: integer weights with a scale per output, and inputs that are quantized row by row, both symmetrically.

The stored form is portable: int8 codes and float scales. They are laid out for this processor's product at first use. Every row of the
input has its own scale, so frames do not depend on each other: batches, padding and streams change nothing.
"""

# M rows, K inputs, N outputs

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.cpu import cpu
from ...layers.bits import Cost, counted_as

LEVELS = 127  # codes are integers from -LEVELS to LEVELS
NARROW = 63  # levels of inputs if two products of bytes are added in 16 bits
TINY = 1e-12  # scale of a row of zeros
ONEDNN, DYNAMIC, FLOAT = "oneDNN int8 (VNNI)", "torch dynamic int8", "float"
VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")


@functools.cache
def kernel() -> str:
    """The product that runs here: oneDNN's of unsigned by signed bytes if the processor has instructions for it, torch's dynamic
    quantization if that has a back end, or else the float product of the codes.

    Without instructions for bytes oneDNN runs its reference code, hundreds of times slower.
    """
    if hasattr(torch.ops.onednn, "qlinear_pointwise") and set(VNNI) & set(cpu().sets):
        return ONEDNN
    return DYNAMIC if set(torch.backends.quantized.supported_engines) - {"none"} else FLOAT


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (N, K) -> codes (N, K) int8 and the step size of each output (N,) float32."""
    weight = weight.detach().float()
    size = weight.abs().amax(1).clamp(min=TINY) / LEVELS
    return (weight / size.unsqueeze(1)).round().to(torch.int8).contiguous(), size  # `Linear.fold` lays weights out by input


def _cost(x: Tensor, layer: Int8Linear) -> Cost:
    return Cost(x.numel() * layer.out_features, 2 * x.numel())


class Int8Linear(nn.Module):
    """A linear layer in int8, x (..., K) -> (..., N) in x's dtype, which cannot be trained."""

    operand_bits = (8, 8)

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = source.weight.shape
        codes, size = codes_of(source.weight)
        self.codes = nn.Parameter(codes, requires_grad=False)  # (N, K)
        self.size = nn.Parameter(size, requires_grad=False)  # (N,)
        bias = source.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone(), requires_grad=False)
        self.stored_bits = {"codes": (codes.numel(), 8 + 32 / self.in_features), "size": (0, 32)}
        self._laid_out: tuple[Any, ...] = ()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K)."""
        return int8_product(x, self)

    def lay_out(self) -> tuple[Any, ...]:
        """(product, its weights, step sizes, bias), made again if the codes have changed."""
        how = kernel() if self.codes.device.type == "cpu" else FLOAT
        key = (how, self.codes.data_ptr(), self.size.dtype)
        if not self._laid_out or self._laid_out[0] != key:
            size, bias = self.size.float(), None if self.bias is None else self.bias.float()
            zeros = torch.zeros(self.out_features, dtype=torch.int64, device=self.codes.device)
            weights: Any
            if how == ONEDNN:
                weights = torch.ops.onednn.qlinear_prepack(self.codes.detach(), None)
            elif how == DYNAMIC:
                signed = torch._make_per_channel_quantized_tensor(self.codes.detach(), size.double(), zeros, 0)
                weights = torch.ops.quantized.linear_prepack(signed, None)
            else:
                weights = self.codes.float() * size.unsqueeze(1)
            self._laid_out = (key, weights, size, zeros, bias)
        return self._laid_out

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._laid_out = ()
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_laid_out": ()}  # the layout can be neither copied nor pickled


@counted_as("matrix product", _cost)
def int8_product(x: Tensor, layer: Int8Linear) -> Tensor:
    """x (..., K) -> (..., N)."""
    if x.is_meta or not x.numel():
        return x.new_empty((*x.shape[:-1], layer.out_features))
    (how, *_), weights, size, zeros, bias = layer.lay_out()
    wide = x.float()
    levels = NARROW if how == DYNAMIC else LEVELS
    scale = wide.abs().amax(-1, keepdim=True).clamp_(min=TINY).div_(levels)  # (..., 1)
    rows = wide / scale
    if how == ONEDNN:
        codes = rows.add_(LEVELS + 1.5).to(torch.uint8)  # rounds, because the conversion truncates
        args: Any = (codes, 1.0, LEVELS + 1, weights, size, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        y = torch.ops.onednn.qlinear_pointwise(*args)
    elif how == DYNAMIC:
        y = torch.ops.quantized.linear_dynamic(rows, weights, True)
    else:
        y = nn.functional.linear(rows.round_(), weights)
    y.mul_(scale)
    out: Tensor = y if bias is None else y.add_(bias)
    return out.to(x.dtype)
