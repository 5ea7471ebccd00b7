"""`fuse` makes a model for inference, without the operations that fold into weights."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from ..errors import UserError
from ..layers.bits import operand_bits
from ..layers.folding import Foldable
from .hubert import HubertModel

M = TypeVar("M", bound=nn.Module)


def fuse(model: M) -> M:
    """Make a copy of a model for inference, with the same outputs in eval mode from fewer operations.

    BatchNorms, learned scales and learned biases fold into the linear or convolutional layers beside them (FusionFormer, Song et al. 2022),
    and the weight norm of the positional convolution folds into its weight. Modules declare themselves what folds
    (`hubert_eff.layers.folding.Foldable`). The source is not changed. The copy cannot be trained: its parameters require no gradient, and
    `train()` leaves a fused HuBERT in eval mode. Fusing it again changes nothing; `export` and `load` keep it fused.

    Args:
        model: a float model, or its encoder.

    Returns:
        The copy, in eval mode.

    Raises:
        UserError: the model is binarized.
    """
    if any((operand_bits(module) or (8, 8))[0] < 8 for module in model.modules()):
        raise UserError("a binarized model cannot be fused: the signs of folded weights are not those that it was trained with")
    fused = copy.deepcopy(model).eval()
    with torch.no_grad():
        fused = _fold(fused)  # type: ignore[assignment]
    if isinstance(fused, HubertModel):
        fused.fused = True
    return fused.requires_grad_(False)


def _fold(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _fold(child))
    return module.fold() if isinstance(module, Foldable) else module
