"""Functions as modules, and what the counter says of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hubert_eff.profiling import count_operations


class Function(nn.Module):
    """A module without submodules that runs a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def macs(module: nn.Module, *inputs: Tensor) -> int:
    with torch.no_grad(), count_operations(module.eval()) as counts:
        module(*inputs)
    return counts.total().macs
