"""Traces, of which ONNX is made, have no loop whose rounds depend on the length, and no strides: a few modules take another form there."""

from __future__ import annotations

import torch


def is_tracing() -> bool:
    """Whether `torch.jit.trace` is following."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None
