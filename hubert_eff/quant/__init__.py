"""Training at one bit (Liu et al. 2022, "BiT"), including convolutions: quantizers, binary layers, policies, `binarize`, `pack`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .binarization import binarize as binarize
    from .modules import BinaryConv1d as BinaryConv1d
    from .modules import BinaryLinear as BinaryLinear
    from .modules import Codes as Codes
    from .modules import Quantizer as Quantizer
    from .packing import pack as pack
    from .policy import POLICIES as POLICIES
    from .policy import Policy as Policy
    from .policy import read_policy as read_policy
    from .quantization import quantize as quantize
    from .summary import quant_report as quant_report

# public name -> module that defines it; imported on first use, since some are below the encoders and some above the models
_PUBLIC = {
    "BinaryConv1d": "modules",
    "BinaryLinear": "modules",
    "Codes": "modules",
    "POLICIES": "policy",
    "Policy": "policy",
    "Quantizer": "modules",
    "binarize": "binarization",
    "pack": "packing",
    "quant_report": "summary",
    "quantize": "quantization",
    "read_policy": "policy",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
