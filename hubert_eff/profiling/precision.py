"""A model in the form, and at the precision, in which it is to be measured."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import unknown
from ..quant.packing import convert_rest, pack
from ..quant.quantization import INT8, is_int8, quantize
from ..quant.storage import is_packed

if TYPE_CHECKING:
    from ..models.hubert import HubertModel

PRECISIONS = ("float32", "bfloat16", INT8)
FLOAT, PACKED, SIMULATED = "float", "packed", "simulated"  # forms: one-bit models run from bits, or as the floats that train


def shipped(model: HubertModel) -> HubertModel:
    """A w1a1 model packed, as its export runs; another as it is. Activations of more bits have no packed form."""
    if model.config.quant != "w1a1" or is_packed(model):
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of scales that never saw data: times do not depend on them
        return pack(model)


def form_of(model: HubertModel) -> str:
    """float, or of a binarized model packed or simulated."""
    if is_packed(model):
        return PACKED
    return FLOAT if model.config.quant == "none" else SIMULATED


def precision_of(model: nn.Module) -> str:
    """The one of `PRECISIONS` that `at_precision` would have given it, or its dtype."""
    if is_int8(model):
        return INT8
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def label(model: str, form: str, precision: str) -> str:
    """A model's name for tables: what is not float, or not float32, says so."""
    said = [text for text in (form, precision) if text not in (FLOAT, PRECISIONS[0])]
    return f"{model} ({', '.join(said)})" if said else model


def without_precision(name: str, model: nn.Module) -> str:
    """`name`, if it ends in the precision of the model, without that."""
    return name.removesuffix(f" {precision_of(model)}")


def at_precision(model: HubertModel, precision: str) -> HubertModel:
    """A model that computes at one of `PRECISIONS`; the given one where that is float32.

    bfloat16: parameters and inputs, of a packed model what is not binary. int8: a fused copy whose encoder has int8 linear layers
    (`hubert_eff.quantize`). Raises `UserError` for another precision, and as `quantize` does.
    """
    if precision == "float32":
        return model
    if precision == "bfloat16":
        half = copy.deepcopy(model)
        if not is_packed(model):
            return half.bfloat16()
        convert_rest(half, torch.bfloat16)
        return half
    if precision != INT8:
        raise unknown("precision", precision, PRECISIONS)
    return quantize(model)
