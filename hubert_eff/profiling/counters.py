"""Counts the multiply-accumulates (MACs) of a forward pass by operation, by module and by bit width.

A dispatch mode sees every operation that reaches a kernel, however it is written in Python (`nn.Linear`, `F.linear`, `@`, einsum), and
forward hooks tell which module is running. Each operation belongs to exactly one of three classes (formulas.py):

- products: matrix products, convolutions and attention have a MAC formula. A bias added inside the product is not counted.
- arithmetic: activations, norms, softmax, reductions and other element-wise operations count in a column of their own, one
  element operation per element of the largest tensor they read or write, however many instructions an element takes; single numbers
  count nothing.
- free: views, copies, padding, indexing and creation compute nothing.

An operation in none of them is an error that names it and its module; `register_formula` adds a formula. A function that declares its
cost (layers/bits.py) counts as one operation whatever it runs, so figures depend on the model and the size of its input, not on the form
that a dtype, a device or a number of threads needs.
The widths of a product's operands are those that its module declares (layers/bits.py), or else those of its dtype.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UserError
from ..layers.bits import Bits, Cost, booking, operand_bits, running_scope
from .formulas import classify


@dataclass
class Tally:
    """Counts of one operation in one module. `seconds` is measured only with a clock."""

    calls: int = 0
    macs_by_bits: dict[Bits, int] = field(default_factory=dict)  # (weight, activation) bits -> MACs
    element_ops: int = 0
    seconds: float = 0.0

    @property
    def macs(self) -> int:
        """MACs of all widths."""
        return sum(self.macs_by_bits.values())

    def add(self, other: Tally) -> None:
        """Add the counts of another tally to this one."""
        self.calls += other.calls
        for bits, macs in other.macs_by_bits.items():
            self.macs_by_bits[bits] = self.macs_by_bits.get(bits, 0) + macs
        self.element_ops += other.element_ops
        self.seconds += other.seconds


@dataclass
class Counts:
    """The counts of a forward pass: (module path, operation, kind) -> tally. The model itself has the path ''."""

    tallies: dict[tuple[str, str, str], Tally] = field(default_factory=lambda: defaultdict(Tally))

    def total(self, module: str = "", operation: str | None = None, kind: str | None = None) -> Tally:
        """The sum over a module with all it contains, or over one operation or kind of operations in it."""
        total = Tally()
        for (path, name, column), tally in self.tallies.items():
            inside = not module or path == module or path.startswith(module + ".")
            if inside and operation in (None, name) and kind in (None, column):
                total.add(tally)
        return total

    def by_module(self) -> dict[str, Tally]:
        """Totals of every module that ran something, each with all it contains."""
        totals: dict[str, Tally] = defaultdict(Tally)
        for (path, _, _), tally in self.tallies.items():
            parts = path.split(".") if path else []
            for depth in range(len(parts) + 1):
                totals[".".join(parts[:depth])].add(tally)
        return dict(totals)

    def own(self, module: str) -> Tally:
        """The counts of a module itself, without its submodules."""
        total = Tally()
        for (path, _, _), tally in self.tallies.items():
            if path == module:
                total.add(tally)
        return total

    def by_operation(self) -> dict[str, Tally]:
        """Totals per operation, most MACs first."""
        return self._by(1)

    def by_kind(self) -> dict[str, Tally]:
        """Totals per kind: matrix products, the kinds of convolutions, attention, norms, element-wise, copies; most MACs first."""
        return self._by(2)

    def _by(self, part: int) -> dict[str, Tally]:
        totals: dict[str, Tally] = defaultdict(Tally)
        for key, tally in self.tallies.items():
            totals[key[part]].add(tally)
        return dict(sorted(totals.items(), key=lambda item: (-item[1].macs, -item[1].element_ops, item[0])))


@dataclass
class _Frame:
    """The running module: its path, and the widths that it declares for its own products."""

    path: str
    bits: Bits | None


class _CountingMode(TorchDispatchMode):
    """Adds every operation to the tally of the module on top of `stack`."""

    def __init__(self, counts: Counts, stack: list[_Frame], clock: Callable[[], float] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts, self.stack, self.clock = counts, stack, clock
        self.declared = Tally()  # tally of the function that declared its cost last

    def book(self, name: str, kind: str, cost: Cost, args: Any) -> None:
        """Count the call of a function that declares its cost."""
        frame = self.stack[-1]
        self.declared = self.counts.tallies[frame.path, name, kind]
        self.declared.calls += 1
        self.declared.element_ops += cost.element_ops
        if cost.macs:
            bits = frame.bits or _dtype_bits(args)
            self.declared.macs_by_bits[bits] = self.declared.macs_by_bits.get(bits, 0) + cost.macs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        scope = running_scope()
        if scope is not None and scope.costed:
            start = self.clock() if self.clock else 0.0
            out = func(*args, **kwargs)
            if self.clock:
                self.declared.seconds += self.clock() - start
            return out
        operation = classify(func, args, kwargs)
        frame = self.stack[-1]
        if operation is None:
            with self:  # an operation made of others (seen under inference_mode): count those instead
                result = func.decompose(*args, **kwargs)
            if result is NotImplemented:
                name = str(func.overloadpacket)
                raise UserError(
                    f"the operation {name} in module '{frame.path or '(model)'}' has no MAC formula: add one with "
                    f"hubert_eff.profiling.register_formula(torch.ops.{name})"
                )
            return result
        start = self.clock() if self.clock else 0.0
        out = func(*args, **kwargs)
        tally = self.counts.tallies[frame.path, operation.name, scope.kind if scope else operation.kind]
        if self.clock:
            tally.seconds += self.clock() - start
        tally.calls += 1
        tally.element_ops += operation.element_ops(args, kwargs, out)
        macs = operation.macs(args, kwargs, out)
        if macs:
            bits = frame.bits or operation.bits or _dtype_bits(args)
            tally.macs_by_bits[bits] = tally.macs_by_bits.get(bits, 0) + macs
        return out


def _dtype_bits(args: Any) -> Bits:
    # torch's products take operands of one dtype; a module with a kernel that mixes them declares its widths
    width = next(8 * a.element_size() for a in args if isinstance(a, Tensor))
    return width, width


def _uncompiled() -> AbstractContextManager[Any]:
    """Run compiled functions uncompiled, since the kernels of a compiler cannot be told apart."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
    if set_stance is None or "torch._dynamo" not in sys.modules:  # not imported, so nothing is compiled; importing takes seconds
        return nullcontext()
    return set_stance("force_eager")  # type: ignore[no-any-return]


@contextmanager
def count_operations(model: nn.Module, clock: Callable[[], float] | None = None) -> Iterator[Counts]:
    """Count what runs inside the `with` block: `with count_operations(model) as counts: model(x)`.

    Operations outside any submodule of `model` count for the path ''. Calls of a module add up; a module with several parents counts for
    the parent that called it. Nothing is left on the model afterwards. `clock`, which returns seconds, is read before and after each
    operation to time it.
    Raises `UserError` from inside the block for an operation without a formula, and for widths that are declared wrongly.
    """
    paths: dict[nn.Module, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        paths[module].append(path)
    bits = {module: operand_bits(module) for module in paths}
    stack = [_Frame("", bits[model])]
    counts = Counts()

    def enter(module: nn.Module, _: Any) -> None:
        parent = stack[-1].path + "." if stack[-1].path else ""
        path = next((path for path in paths[module] if path.startswith(parent)), paths[module][0])
        stack.append(_Frame(path, bits[module]))

    def leave(module: nn.Module, *_: Any) -> None:
        stack.pop()

    hooks = []
    try:
        for module in paths:
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(leave, always_call=True))
        mode = _CountingMode(counts, stack, clock)
        with _uncompiled(), booking(mode.book), mode:
            yield counts
    finally:
        for hook in hooks:
            hook.remove()
