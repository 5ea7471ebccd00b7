"""Binarized models whose attention is as decided as a trained one, and how packed ones differ from simulated ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hubert_eff
from hubert_eff.kernels import loader


def runs(kernel: str) -> bool:
    """Whether a kernel runs on this machine."""
    return isinstance(loader._load(kernel), loader.Kernel)


def in_torch(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Tensor]) -> Tensor:
    """The result of the same call in plain torch."""
    with monkeypatch.context() as patch:
        patch.setenv(loader.VARIABLE, "torch")
        return call()


def debug(encoder: str, policy: str = "default", zero: bool = False, **overrides: Any) -> hubert_eff.models.hubert.HubertModel:
    """A binarized debug model whose attention is as decided as a trained one's."""
    torch.manual_seed(0)
    model = hubert_eff.build(f"{encoder}-debug", **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter *= 20
    model = hubert_eff.binarize(model, "w1a1", policy).train()
    with torch.no_grad():
        model(torch.randn(2, 16_000), mask=False, features_only=True)  # scales
        for name, parameter in model.named_parameters():
            if name.endswith(".move"):
                parameter.zero_() if zero else parameter.normal_(std=0.1)
            elif zero and name.endswith(".bias") and "norm" not in name:
                parameter.zero_()
    return model.eval()


def differing(a: list[Tensor], b: list[Tensor]) -> int:
    """The number of elements that are not the same to the last bit."""
    assert len(a) == len(b) and all(x.isfinite().all() for x in a)
    return sum(int((x.view(torch.int32) != y.view(torch.int32)).sum()) for x, y in zip(a, b))
