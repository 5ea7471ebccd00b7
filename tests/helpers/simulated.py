"""Quantizers with given scales and masks, binarized models and their input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import hubert_eff
from hubert_eff.quant import Quantizer
from hubert_eff.quant.modules import FrameMask

ENCODERS = hubert_eff.list_encoders()


def ready(quantizer: Quantizer, scale: float) -> Quantizer:
    """With its scale given, in double precision."""
    quantizer.double()
    nn.init.constant_(quantizer.scale, scale)
    quantizer.initialized.fill_(True)
    quantizer._ready = True
    return quantizer


def masked_by(module: nn.Module, valid: Tensor) -> nn.Module:
    """A module whose quantizers see a batch with these valid frames."""
    frames = FrameMask()
    frames.valid = valid
    for part in module.modules():
        if isinstance(part, Quantizer):
            part.frames = frames
    return module


def debug(encoder: str, spec: str, policy: str = "default", **keys: object) -> hubert_eff.models.hubert.HubertModel:
    """A binarized debug model; its scales start from its first batch in train mode."""
    torch.manual_seed(0)
    model = hubert_eff.build(f"{encoder}-debug", num_classes=(20,), dropout=0.0, attention_dropout=0.0, **keys)
    return hubert_eff.binarize(model, spec, policy)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    padding = torch.zeros(3, 16_000, dtype=torch.bool)
    padding[1, 9_123:] = True
    padding[2, 400:] = True  # one valid frame
    return torch.randn(3, 16_000).to(dtype), padding
