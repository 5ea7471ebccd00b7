"""Compiles blocks for training. All blocks of a kind run one compiled function, so each shape is compiled once and not once per block."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

BACKEND = "inductor"
VARIANTS = 64  # most compiled forms of a block: one per shape of the batch, two with checkpoint_activations


def call_block(block: nn.Module, *inputs: object) -> Tensor:
    """`block(*inputs)`."""
    return block(*inputs)  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def compiled_call() -> Callable[..., Tensor]:
    """A function for `block(*inputs)`, compiled for every shape up to `VARIANTS`; torch runs further shapes uncompiled, and says so once.

    It replaces `nn.Module.compile`, which would also compile validation at all its lengths: modules stay as they are, and so do their
    copies, exports and profiles.
    """
    limits = torch._dynamo.config
    for name in ("recompile_limit", "cache_size_limit"):  # torch 2.6 renamed it
        if hasattr(limits, name):
            setattr(limits, name, max(getattr(limits, name), VARIANTS))
            break
    return torch.compile(call_block, backend=BACKEND, dynamic=False)  # there are few, fixed lengths, and each gets its own kernels
