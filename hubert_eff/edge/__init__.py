"""Models on small devices: numerics of half precision, and a layout for accelerators (Xu et al. 2024)."""

from .numerics import MadLayerNorm, conditional_softmax, half_precision, mad_layer_norm
from .rewrite import rewrite

__all__ = ["MadLayerNorm", "conditional_softmax", "half_precision", "mad_layer_norm", "rewrite"]
