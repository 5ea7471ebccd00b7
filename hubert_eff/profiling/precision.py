"""A float model at a lower precision, to be measured beside itself."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from ..errors import UserError, unknown
from ..fusing import fuse
from ..layers.linear import Linear

if TYPE_CHECKING:
    from ..model import HubertModel

PRECISIONS = ("float32", "bfloat16", "int8")

M = TypeVar("M", bound=nn.Module)


def at_precision(model: HubertModel, precision: str) -> HubertModel:
    """A model that computes at one of `PRECISIONS`; the given one where that is float32.

    bfloat16: parameters and inputs. int8: a fused copy whose encoder has int8 linear layers (`int8_linears`), on a CPU.
    Raises `UserError` for another precision.
    """
    if precision == "float32":
        return model
    if precision == "bfloat16":
        return copy.deepcopy(model).bfloat16()
    if precision != "int8":
        raise unknown("precision", precision, PRECISIONS)
    fused = fuse(model)
    fused.encoder = int8_linears(fused.encoder)
    return fused


def int8_linears(module: M) -> M:
    """A copy in which linear layers hold int8 weights and quantise their inputs as they come, by torch's dynamic quantisation.

    For fused modules: others apply several projections as one product and need their float weights. Raises `UserError` where this torch
    has no dynamic quantisation.
    """
    quantize_dynamic = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantize_dynamic is None:
        raise UserError(f"int8: torch {torch.__version__} has no dynamic quantisation; torch 2.4 to 2.9 have")
    module = copy.deepcopy(module)
    for part in module.modules():
        if type(part) is Linear:
            part.__class__ = nn.Linear  # type: ignore[assignment]  # torch looks for exactly this class
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-any-return]


def own_weights(module: nn.Module) -> list[torch.Tensor]:
    """The parameters of a module itself, those that torch's quantised layers have packed among them."""
    packed = getattr(module, "_weight_bias", None)
    return [*module.parameters(recurse=False), *([t for t in packed() if t is not None] if callable(packed) else [])]
