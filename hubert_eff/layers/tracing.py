"""Graphs that are made ahead, by `torch.jit.trace` for ONNX or by `torch.export`, have no loop whose rounds depend on the length: a few
modules take another form there. Where only shapes are followed, to count, loops have one round, so that an hour of audio takes no longer
than a second."""

from __future__ import annotations

import torch
from torch import Tensor


def is_tracing() -> bool:
    """Whether `torch.jit.trace` is following: sizes are constants to Python, and a graph has no strides."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def is_exporting() -> bool:
    """Whether `torch.export` is following: sizes may be symbols, and what Python asks of one restricts the lengths that a graph takes."""
    if not torch.compiler.is_compiling():
        return False
    asked = getattr(torch.compiler, "is_exporting", None)  # from torch 2.7 on
    return bool(asked()) if asked is not None else not torch.compiler.is_dynamo_compiling()


def is_symbolic() -> bool:
    """Whether a graph is made ahead, by either: lengths are not known."""
    return is_tracing() or is_exporting()


def follows_shapes(x: Tensor) -> bool:
    """Whether nothing is computed: x is a meta tensor, and no gradient is recorded (whose memory would depend on the form)."""
    return x.is_meta and not torch.is_grad_enabled()


def every(x: Tensor, rate: int) -> Tensor:
    """Of x (B, T, ...) the frames 0, rate, 2 rate, ...: (B, ceil(T / rate), ...)."""
    if is_exporting():  # the same; written so, the number of frames is the same expression as behind a strided convolution
        return x.unfold(1, 1, rate).squeeze(-1)
    return x[:, ::rate]
