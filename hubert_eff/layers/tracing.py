"""Traces, of which ONNX is made, have no loop whose rounds depend on the length, and no strides: a few modules take another form there.
Where only shapes are followed, to count, loops have one round, so that an hour of audio takes no longer than a second."""

from __future__ import annotations

import torch
from torch import Tensor


def is_tracing() -> bool:
    """Whether `torch.jit.trace` is following."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def follows_shapes(x: Tensor) -> bool:
    """Whether nothing is computed: x is a meta tensor, and no gradient is recorded (whose memory would depend on the form)."""
    return x.is_meta and not torch.is_grad_enabled()
