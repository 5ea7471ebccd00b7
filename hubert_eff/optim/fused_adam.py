"""Adam with decoupled weight decay, with one kernel for all tensors (on a GPU, and on a CPU from torch 2.4 on)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.AdamW):
    """torch's fused AdamW with the results of fairseq's `adam`, which adds eps to the root before correcting its bias.

    The two forms differ in the first updates where a gradient is not much larger than eps.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], plain_eps: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=plain_eps, weight_decay=weight_decay, fused=True)
        for group in self.param_groups:
            group["plain_eps"], group["updates"] = plain_eps, 0  # torch's own `eps` is computed from these in every update

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update."""
        for group in self.param_groups:
            group["updates"] += 1
            group["eps"] = group["plain_eps"] / math.sqrt(1.0 - group["betas"][1] ** group["updates"])
        return super().step(closure)
