"""What layers tell the profiler: the bit widths that they multiply or store, and which operations form one attention.

Two attributes describe a module itself, without its submodules. A module without them works in the dtypes of its tensors.

    operand_bits = (1, 1)                          (weight, activation) bits of every product that the module runs directly: matrix
                                                   products, convolutions, attention
    stored_bits = {"weight": (elements, bits)}     its own parameters or buffers that are kept in fewer bits than their dtype has; what
                                                   comes with them, such as one scale per channel, adds its share

A module that computes with +-1 in floats and one that computes the same from packed bits declare the same widths, and so have the same
MACs, bit operations and storage in a profile; element operations are those of the form that runs. A module whose products differ in width
runs each kind in a submodule of its own.

`@counted_as("attention")` makes a function count like one call of `F.scaled_dot_product_attention`. With a `cost`, a formula of the
function's arguments, only the formula is counted, so a function costs the same in all of its forms, which may depend on dtype, device,
number of threads or length, cut the work into blocks, or recompute some of it to save memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from ..errors import UserError

Bits = tuple[int, int]

F = TypeVar("F", bound=Callable[..., Any])


class Cost(NamedTuple):
    """The cost of one call of a function in any form."""

    macs: int
    element_ops: int


class Scope(NamedTuple):
    """A running function: the kind that it counts as, and whether its cost has been counted already."""

    kind: str
    costed: bool


Book = Callable[[str, str, Cost, Any], None]  # name of the function, kind, cost, arguments

_scopes: list[Scope] = []
_books: list[Book] = []  # the books of all running counters


def counted_as(kind: str, cost: Callable[..., Cost] | None = None) -> Callable[[F], F]:
    """Decorate a function so that its operations count as this kind (profiling/formulas.py), or that `cost(*its arguments)` counts instead,
    unless a function with a cost calls it."""

    def decorate(function: F) -> F:
        name = "hubert_eff." + function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # a compiler counts nothing
                return function(*args, **kwargs)
            outer = running_scope()
            if outer is not None and outer.costed:
                return function(*args, **kwargs)
            if cost is not None and _books:
                _books[-1](name, kind, cost(*args, **kwargs), args)
            _scopes.append(Scope(kind, cost is not None))
            try:
                return function(*args, **kwargs)
            finally:
                _scopes.pop()

        return cast(F, run)

    return decorate


def running_scope() -> Scope | None:
    """The innermost running `counted_as`."""
    return _scopes[-1] if _scopes else None


@contextmanager
def booking(book: Book) -> Iterator[None]:
    """Call `book` with the declared cost of each function that is called inside."""
    _books.append(book)
    try:
        yield
    finally:
        _books.pop()


def attention_cost(q: Tensor, k: Tensor, v: Tensor, masked: bool) -> Cost:
    """Cost of softmax(q k' + mask) v, q (..., T, d), k (..., T', d), v (..., T', d'): two products, scaling of q and k, mask, softmax."""
    pairs = q.shape[:-1].numel() * k.size(-2)
    return Cost(pairs * (q.size(-1) + v.size(-1)), q.numel() + k.numel() + pairs * (2 if masked else 1))


def offsets_seen(queries: int, keys: int, block: int) -> int:
    """Number of products of one head's queries with relative positions; a block of n queries shares the keys + n - 1 offsets it sees."""
    whole, rest = divmod(queries, block)
    return whole * block * (keys + block - 1) + rest * (keys + rest - 1)


def operand_bits(module: nn.Module) -> Bits | None:
    """The declared widths of the products that `module` runs itself; None for those of the dtypes."""
    bits = getattr(module, "operand_bits", None)
    if bits is None:
        return None
    if not (isinstance(bits, tuple) and len(bits) == 2 and all(isinstance(b, int) and b > 0 for b in bits)):
        raise UserError(f"{type(module).__name__}.operand_bits={bits!r} must be a pair of positive widths such as (1, 1)")
    return bits


def stored_bits(module: nn.Module) -> Mapping[str, tuple[int, float]]:
    """(elements, bits per element) of `module`'s own parameters and buffers that are narrower than their dtype, by name."""
    stored: Mapping[str, tuple[int, float]] = getattr(module, "stored_bits", {})
    missing = sorted(set(stored) - {*module._parameters, *module._buffers})
    if missing:
        raise UserError(f"{type(module).__name__}.stored_bits names '{missing[0]}', which is not a parameter or buffer of its own")
    return stored
