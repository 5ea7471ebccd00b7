"""Folding for inference: norms and affine maps are applied once to the weights of the layers beside them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .convolution import DepthwiseConv
from .norm import NoNorm


@runtime_checkable
class Foldable(Protocol):
    """A module with parts that fold. `hubert_eff.fuse` calls all of them, children before the modules that hold them."""

    def fold(self) -> nn.Module:
        """Return the replacement, which computes the same in eval mode from the same arguments: the module itself, changed, or another.

        It is called in eval mode, without gradients, on a copy of the model; a second call must change nothing.
        """


def fold_after(layer: nn.Linear | DepthwiseConv, norm: nn.Module) -> nn.Module:
    """Fold a BatchNorm into the layer before it: W' = s W, b' = s (b - mean) + beta, s = gamma / sqrt(var + eps).

    Returns the norm's replacement: `NoNorm`, or the norm itself if it is not a BatchNorm.
    """
    if not isinstance(norm, nn.BatchNorm1d):
        return norm
    assert norm.running_mean is not None and norm.running_var is not None
    layer.weight, layer.bias = fuse_conv_bn_weights(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return NoNorm()


def fold_before(norm: nn.Module, *layers: nn.Linear) -> nn.Module:
    """Fold a BatchNorm into the linear layers that read it; returns its replacement, as `fold_after` does."""
    if not isinstance(norm, nn.BatchNorm1d):
        return norm
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    for layer in layers:
        fold_affine(layer, scale, norm.bias - norm.running_mean * scale)
    return NoNorm()


def fold_affine(layer: nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """Make `layer(x)` equal to the former `layer(scale * x + shift)`; scale and shift are (in_features,)."""
    bias = layer.weight @ shift
    layer.bias = nn.Parameter(bias if layer.bias is None else layer.bias + bias)
    layer.weight = nn.Parameter(layer.weight * scale)
