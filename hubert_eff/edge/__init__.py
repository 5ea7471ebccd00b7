"""Models on small devices: numerics of half precision, and a layout for accelerators (Xu et al. 2024)."""

from .numerics import MadLayerNorm, conditional_softmax, half_precision, mad_layer_norm
from .rewrite import FORMS, HALF, rewrite, rewritten_as

__all__ = ["FORMS", "HALF", "MadLayerNorm", "conditional_softmax", "half_precision", "mad_layer_norm", "rewrite", "rewritten_as"]
