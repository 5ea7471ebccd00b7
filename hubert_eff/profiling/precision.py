"""Brings a model into the form and precision in which it is measured."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UserError, unknown
from ..kernels.cpu import cpu
from ..kernels.loader import absence, kernel_in_use
from ..layers import choice
from ..models.fuse import fuse
from ..quant.binarization import binarize
from ..quant.packing import convert_rest, packed_copy
from ..quant.quantization import INT8, is_int8, quantize
from ..quant.runtime import int8
from ..quant.storage import fold_moves, is_packed

if TYPE_CHECKING:
    from ..models.hubert import HubertModel

ONE_BIT = "w1a1"
PRECISIONS = ("float32", "bfloat16", INT8, ONE_BIT)
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # instruction sets with bfloat16 products
FLOAT, PACKED, SIMULATED = "float", "packed", "simulated"  # forms; one-bit models run from bits or as the floats of training


def shipped(model: HubertModel) -> HubertModel:
    """The form of a model's export: a float model fused, a w1a1 model packed. Models with more bits of activations stay as they are."""
    if model.config.quant == "none":
        return fuse(model)
    if model.config.quant != ONE_BIT or is_packed(model):
        return model
    packed = packed_copy(model)  # scales may have seen no data, since times do not depend on them
    fold_moves(packed)
    return packed


def require(precision: str, device: str = "cpu") -> None:
    """Raise `UserError` if this processor or this torch has no fast products for one of `PRECISIONS`."""
    if device != "cpu":
        if precision in (INT8, ONE_BIT):
            raise UserError(f"--precision {precision} runs on a CPU only: leave out --device {device}")
        return
    found = cpu()
    if precision == "bfloat16" and found.sets and not set(BFLOAT16) & set(found.sets):
        raise UserError(f"--precision bfloat16: {found.name} has no products of it (AVX-512 BF16, AMX or Arm's BF16): leave it out")
    if precision == INT8 and int8.kernel() == int8.FLOAT:
        raise UserError(f"--precision int8: torch {torch.__version__} has no int8 products for {found.name}: leave it out")
    if precision == ONE_BIT and (why := absence()):
        raise UserError(f"--precision {ONE_BIT}: {why}")


def kernel_of(model: nn.Module, device: str = "cpu") -> str:
    """The kernel of a model's linear layers, for tables."""
    if device != "cpu":
        return f"torch on {device}"
    if is_packed(model):
        return kernel_in_use()
    if is_int8(model):
        return int8.kernel()
    precision = precision_of(model)
    if precision == "float32":
        return "torch" if choice.chosen() == choice.STOCK else "torch and oneDNN float32"
    return f"torch {precision}"


def form_of(model: HubertModel) -> str:
    """The form of a model: float, or for a binarized one packed or simulated."""
    if is_packed(model):
        return PACKED
    return FLOAT if model.config.quant == "none" else SIMULATED


def precision_of(model: nn.Module) -> str:
    """The one of `PRECISIONS` that gives such a model, or its dtype."""
    if is_int8(model):
        return INT8
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def label(model: str, form: str, precision: str) -> str:
    """A model's name for tables, with its form if that is not float and its precision if that is not float32."""
    said = [text for text in (form, precision) if text not in (FLOAT, PRECISIONS[0])]
    return f"{model} ({', '.join(said)})" if said else model


def without_precision(name: str, model: nn.Module) -> str:
    """`name` without the precision of the model at its end."""
    return name.removesuffix(f" {precision_of(model)}")


def at_precision(model: HubertModel, precision: str) -> HubertModel:
    """Bring a model to one of `PRECISIONS`; float32 returns the given model.

    bfloat16 applies to parameters and inputs; in a packed model, to everything that is not binary. int8 is a fused copy whose encoder has
    int8 linear layers (`hubert_eff.quantize`). w1a1 is packed; a float model is first binarized with scales that have seen no data, so its
    time and size are those of a trained one, and its outputs are not. Raises `UserError` for another precision, and as `quantize` and
    `binarize` do.
    """
    if precision == "float32":
        return model
    if precision == "bfloat16":
        half = copy.deepcopy(model)
        if not is_packed(model):
            return half.bfloat16()
        convert_rest(half, torch.bfloat16)
        return half
    if precision == ONE_BIT:
        return shipped(model if model.config.quant == ONE_BIT else binarize(model))
    if precision != INT8:
        raise unknown("precision", precision, PRECISIONS)
    return quantize(model)
