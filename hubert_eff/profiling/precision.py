"""A model in the form, and at the precision, in which it is to be measured."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from ..errors import UserError, unknown
from ..layers.linear import Linear
from ..models.fuse import fuse
from ..quant.packing import convert_rest, pack
from ..quant.storage import is_packed

if TYPE_CHECKING:
    from ..models.hubert import HubertModel

PRECISIONS = ("float32", "bfloat16", "int8")
FLOAT, PACKED, SIMULATED = "float", "packed", "simulated"  # forms: one-bit models run from bits, or as the floats that train

M = TypeVar("M", bound=nn.Module)


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
    if any(callable(getattr(module, "_weight_bias", None)) for module in model.modules()):
        return "int8"
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
    (`int8_linears`), on a CPU. Raises `UserError` for another precision, and for int8 of a binarized model.
    """
    if precision == "float32":
        return model
    if precision == "bfloat16":
        half = copy.deepcopy(model)
        if not is_packed(model):
            return half.bfloat16()
        convert_rest(half, torch.bfloat16)
        return half
    if precision != "int8":
        raise unknown("precision", precision, PRECISIONS)
    if form_of(model) != FLOAT:
        raise UserError(f"int8 is a precision of float models, and this one is binarized ({model.config.quant}): leave out int8")
    fused = fuse(model)
    fused.encoder = int8_linears(fused.encoder)
    return fused


def int8_linears(module: M) -> M:
    """A copy in which linear layers hold int8 weights and quantize their inputs as they come, by torch's dynamic quantization.

    For fused modules: others apply several projections as one product and need their float weights. Raises `UserError` where this torch
    has no dynamic quantization.
    """
    quantize_dynamic = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantize_dynamic is None:
        raise UserError(f"int8: torch {torch.__version__} has no dynamic quantization; torch 2.4 to 2.9 have")
    module = copy.deepcopy(module)
    for part in module.modules():
        if type(part) is Linear:
            part.__class__ = nn.Linear  # type: ignore[assignment]  # torch looks for exactly this class
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-any-return]


def own_weights(module: nn.Module) -> list[torch.Tensor]:
    """The parameters of a module itself, those that torch's quantized layers have packed among them."""
    packed = getattr(module, "_weight_bias", None)
    return [*module.parameters(recurse=False), *([t for t in packed() if t is not None] if callable(packed) else [])]
