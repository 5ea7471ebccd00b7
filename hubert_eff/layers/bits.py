"""What layers tell the profiler: how wide the numbers are that they multiply or keep, and which operations are one attention.

Two attributes, each about the module itself and not about its submodules. A module without them works in the dtypes of its tensors.

    operand_bits = (1, 1)                          (weight, activation) bits of every product that the module runs directly: matrix
                                                   products, convolutions, attention
    stored_bits = {"weight": (elements, bits)}     its own parameters or buffers that are kept in fewer bits than their dtype has; what
                                                   comes with them, such as one scale per channel, adds its share

A module that computes with +-1 in floats and one that computes the same from packed bits declare the same, and so have the same MACs,
bit operations and storage in a profile; element operations are those of the form that runs. A module whose products differ in width
runs each kind in a submodule of its own.

`@counted_as("attention")` on a function makes what it runs count like one call of `F.scaled_dot_product_attention`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..errors import UserError

Bits = tuple[int, int]

F = TypeVar("F", bound=Callable[..., Any])

_kinds: list[str] = []


def counted_as(kind: str) -> Callable[[F], F]:
    """Decorator: count every operation that the function runs as of this kind (profiling/formulas.py)."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # nothing is counted there
                return function(*args, **kwargs)
            _kinds.append(kind)
            try:
                return function(*args, **kwargs)
            finally:
                _kinds.pop()

        return cast(F, run)

    return decorate


def declared_kind() -> str | None:
    """The innermost `counted_as` that is running."""
    return _kinds[-1] if _kinds else None


def operand_bits(module: nn.Module) -> Bits | None:
    """The declared widths of the products that `module` runs itself; None: those of the dtypes."""
    bits = getattr(module, "operand_bits", None)
    if bits is None:
        return None
    if not (isinstance(bits, tuple) and len(bits) == 2 and all(isinstance(b, int) and b > 0 for b in bits)):
        raise UserError(f"{type(module).__name__}.operand_bits={bits!r} must be a pair of positive widths such as (1, 1)")
    return bits


def stored_bits(module: nn.Module) -> Mapping[str, tuple[int, float]]:
    """(elements, bits per element) by name of those of `module`'s own parameters and buffers that are narrower than their dtype."""
    stored: Mapping[str, tuple[int, float]] = getattr(module, "stored_bits", {})
    missing = sorted(set(stored) - {*module._parameters, *module._buffers})
    if missing:
        raise UserError(f"{type(module).__name__}.stored_bits names '{missing[0]}', which is no parameter or buffer of its own")
    return stored
