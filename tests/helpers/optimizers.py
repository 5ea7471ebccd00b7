"""Parameters and gradients for optimizers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .paths import GOLDEN


def golden(name: str) -> dict[str, np.ndarray]:
    """Arrays that the authors' code computed."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def tensors(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Matrices and vectors of shared and single shapes, scalars of two shapes, one tensor that is all zero."""
    torch.manual_seed(1)
    shapes = [(4, 6), (5,), (4, 6), (1,), (), (3, 2, 5), (5,), (4, 6), (1,)]
    made = [nn.Parameter((0.3 * torch.randn(shape)).to(dtype)) for shape in shapes]
    made.append(nn.Parameter(torch.zeros(5, dtype=dtype)))
    return made


def gradients(params: list[nn.Parameter], step: int, missing: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if i in missing else grad


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]
