"""`quantize` turns a trained float model into one with int8 linear layers. Nothing is trained; scales follow from the weights."""

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
    """Make a fused copy of a float HuBERT whose encoder has int8 linear layers (`Int8Linear`).

    The source is not changed. Weights have a scale per output, inputs a scale per frame that is computed as they come. Extractor,
    positions, norms and products of attention stay in the model's dtype. The copy can be exported and streamed, but not trained; quantizing
    it again changes nothing.

    Args:
        model: a float model.
        spec: the precision; only `int8`.

    Returns:
        The copy, in eval mode.

    Raises:
        UserError: the spec is another one, or the model is binarized, rewritten for accelerators, or not a HubertModel.
    """
    if spec != INT8:
        raise unknown("quantization without training", spec, [INT8])
    if not isinstance(model, HubertModel):
        raise UserError(f"cannot quantize a {type(model).__name__}: expected a HubertModel")
    if model.config.quant != "none":
        raise UserError(
            f"int8 is a precision of float models, and this one is binarized ({model.config.quant}): leave out int8, "
            "or quantize the float checkpoint that it was made from"
        )
    if model.edge:
        raise UserError("int8 is not for the layout of accelerators (--edge): quantize the model that was rewritten to it")
    fused = fuse(model)
    fused.encoder = int8_linears(fused.encoder)
    return fused


def is_int8(model: nn.Module) -> bool:
    """Whether a model has int8 linear layers."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def int8_linears(module: M) -> M:
    """A copy of a fused module with int8 linear layers; modules that are not fused compute several projections as one product and need
    float weights."""
    return _replaced(copy.deepcopy(module))  # type: ignore[return-value]


def _replaced(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Linear):
        return Int8Linear(module)
    for name, child in module.named_children():
        setattr(module, name, _replaced(child))
    return module
