"""`quantize`: a trained float model as one whose linear layers compute in int8. Nothing is trained; scales are those of the weights."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from ..errors import UserError, unknown
from ..models.fuse import fuse
from ..models.hubert import HubertModel
from .runtime.int8 import Int8Linear

M = TypeVar("M", bound=nn.Module)
INT8 = "int8"


def quantize(model: HubertModel, spec: str = INT8) -> HubertModel:
    """A fused copy of a float HuBERT in eval mode whose encoder has int8 linear layers (`Int8Linear`); the source is not changed.

    spec: int8. Weights get a scale per output, inputs one per frame as they come; extractor, positions, norms and products of attention
    stay in the model's dtype. `hubert_eff.export` writes the copy, it streams, and it cannot be trained. To quantize it again changes
    nothing. Raises `UserError` for another spec, another model, and a binarized one.
    """
    if spec != INT8:
        raise unknown("quantization without training", spec, [INT8])
    if not isinstance(model, HubertModel):
        raise UserError(f"cannot quantize a {type(model).__name__}: expected a HubertModel")
    if model.config.quant != "none":
        raise UserError(f"int8 is a precision of float models, and this one is binarized ({model.config.quant}): leave out int8")
    fused = fuse(model)
    fused.encoder = int8_linears(fused.encoder)
    return fused


def is_int8(model: nn.Module) -> bool:
    """Whether a model has int8 linear layers."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def int8_linears(module: M) -> M:
    """A copy of a fused module whose linear layers compute in int8; others apply several projections as one product, and need float
    weights."""
    return _replaced(copy.deepcopy(module))  # type: ignore[return-value]


def _replaced(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Linear):
        return Int8Linear(module)
    for name, child in module.named_children():
        setattr(module, name, _replaced(child))
    return module
