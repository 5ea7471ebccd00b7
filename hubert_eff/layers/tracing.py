"""Tells modules how they are traced.

Graphs of `torch.jit.trace` (for ONNX) and `torch.export` cannot have loops that depend on the length, so a few modules take another form
there. If only shapes are followed, to count operations, loops have one round, so an hour of audio takes no longer than a second.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_tracing() -> bool:
    """Whether `torch.jit.trace` is tracing: sizes are constants in Python, and a graph has no strides."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def is_exporting() -> bool:
    """Whether `torch.export` is tracing: sizes may be symbols, and comparing them in Python restricts the lengths of a graph."""
    if not torch.compiler.is_compiling():
        return False
    asked = getattr(torch.compiler, "is_exporting", None)  # from torch 2.7 on
    return bool(asked()) if asked is not None else not torch.compiler.is_dynamo_compiling()


def is_symbolic() -> bool:
    """Whether either of them is tracing: lengths are unknown."""
    return is_tracing() or is_exporting()


def follows_shapes(x: Tensor) -> bool:
    """Whether only shapes are followed: x is a meta tensor, and no gradient is recorded (whose memory would depend on the form)."""
    return x.is_meta and not torch.is_grad_enabled()


def every(x: Tensor, rate: int) -> Tensor:
    """Take the frames 0, rate, 2 rate, ... of x (B, T, ...): (B, ceil(T / rate), ...)."""
    if is_exporting():  # in this form the number of frames is the same expression as after a strided convolution
        return x.unfold(1, 1, rate).squeeze(-1)
    return x[:, ::rate]
