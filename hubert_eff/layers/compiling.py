"""Blocks compiled for training. All blocks of a kind run one compiled function, so that a shape is compiled once and not once per block."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

BACKEND = "inductor"
VARIANTS = 64  # compiled forms of a block that are kept: one per shape of the batch, two with checkpoint_activations


def call_block(block: nn.Module, *inputs: object) -> Tensor:
    """`block(*inputs)`."""
    return block(*inputs)  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def compiled_call() -> Callable[..., Tensor]:
    """`block(*inputs)`, compiled anew for every shape up to `VARIANTS`; torch runs further ones as they are, and says so once.

    A function in place of `nn.Module.compile`, which would also compile a block's validation at all its lengths: modules stay as they
    are, and so do copies, exports and profiles of them.
    """
    limits = torch._dynamo.config
    for name in ("recompile_limit", "cache_size_limit"):  # the older name first went with torch 2.6
        if hasattr(limits, name):
            setattr(limits, name, max(getattr(limits, name), VARIANTS))
            break
    return torch.compile(call_block, backend=BACKEND, dynamic=False)  # lengths are few and fixed: each gets its own kernels
