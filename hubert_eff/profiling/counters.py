"""Count the multiply-accumulates (MACs) of a forward pass, per operation and per module that runs it.

A dispatch mode sees every operation that reaches a kernel, whatever Python wrote it (`nn.Linear`, `F.linear`, `@`, einsum), and
forward hooks say which module was running. Each operation belongs to exactly one of three classes:

- products: matrix products, convolutions and attention have a MAC formula, from `torch.utils.flop_counter` (1 MAC = 2 FLOP) or
  from this file where torch has none. A bias added inside the product is not counted.
- arithmetic: activations, norms, softmax, reductions and other element-wise operations count in a column of their own, one
  element operation per element of the largest tensor they read or write, however many instructions an element takes.
- free: views, copies, padding, indexing and creation compute nothing.

An operation in none of them is an error that names it and its module; `register_formula` adds a formula.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..errors import UserError

Formula = Callable[..., int]
F = TypeVar("F", bound=Formula)

# Operations are looked up by name ("aten.mm", without the overload): names absent from the running torch do no harm.
_MACS: dict[str, Formula] = {}  # the operation's own arguments, and out=result -> MACs
_ELEMENTS: dict[str, Formula] = {}  # the same -> element operations that a product has fused in

_ARITHMETIC = frozenset(
    "aten." + name
    for name in (
        # activations and comparisons without torch's pointwise tag in every version
        "gelu gelu_ glu relu relu_ prelu floor_divide clamp_min clamp_max isnan isinf isfinite "
        # norms
        "native_layer_norm native_group_norm native_batch_norm cudnn_batch_norm miopen_batch_norm batch_norm_elemt "
        "_native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_no_update "
        "_fused_rms_norm _weight_norm_interface linalg_vector_norm norm "
        # softmax and reductions
        "_softmax _log_softmax _safe_softmax logsumexp sum mean std var std_mean var_mean prod amax amin aminmax "
        "max min argmax argmin any all cumsum cumprod"
    ).split()
)
_FREE = frozenset(
    "aten." + name
    for name in (
        # copies and changes of shape
        "clone copy_ copy detach_ _to_copy cat stack _unsafe_view unsafe_split unsafe_split_with_sizes unsafe_chunk set_ resize_ "
        "constant_pad_nd reflection_pad1d replication_pad1d repeat repeat_interleave roll flip to_mkldnn to_dense "
        "mkldnn_reorder_linear_weight "
        # indexing and selection
        "index index_select index_put index_put_ gather scatter scatter_ embedding masked_fill masked_fill_ masked_select "
        "slice_scatter select_scatter nonzero topk sort tril tril_ triu triu_ "
        # creation
        "empty empty_like empty_strided new_empty new_empty_strided zeros zeros_like new_zeros zero_ ones ones_like new_ones "
        "full full_like new_full fill_ arange linspace eye scalar_tensor rand randn randint "
        # values read by Python
        "_local_scalar_dense item equal is_same_size _assert_async"
    ).split()
) | {"mkldnn._reorder_linear_weight", "prim.device"}


def register_formula(op: torch._ops.OpOverloadPacket) -> Callable[[F], F]:
    """Give a custom operation a MAC formula: `@register_formula(torch.ops.mylib.product)`.

    The formula is called with the operation's arguments and its result as `out=`, and returns MACs as an integer.
    Raises `UserError` for anything that is not an operation (`torch.ops.<library>.<name>`), or that has a formula.
    """
    if not isinstance(op, torch._ops.OpOverloadPacket):
        raise UserError(f"register_formula takes an operation such as torch.ops.mylib.product, not {op!r}")
    name = str(op)
    if name in _MACS or op in flop_registry:
        raise UserError(f"the operation {name} has a MAC formula already")

    def register(formula: F) -> F:
        _MACS[name] = formula
        return formula

    return register


def _own(*names: str) -> Callable[[F], F]:
    def register(formula: F) -> F:
        _MACS.update(dict.fromkeys(names, formula))
        return formula

    return register


@_own("aten.linear", "mkldnn._linear_pointwise", "aten.mkldnn_linear")
def _linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:  # (..., in), (out, in)
    return x.numel() * weight.shape[0]


@_own("mkl._mkl_linear")
def _mkl_linear(x: Tensor, _packed: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return x.numel() * weight.shape[0]


@_own("aten.mv", "aten.dot", "aten.vdot")
def _matrix_vector(matrix: Tensor, *_: Any, **__: Any) -> int:  # (m, n) or (n,), (n,)
    return matrix.numel()


@_own("aten.addmv")
def _add_matrix_vector(_: Tensor, matrix: Tensor, *__: Any, **___: Any) -> int:
    return matrix.numel()


# all of F.scaled_dot_product_attention's kernels; a causal mask saves nothing in this count
_ATTENTION = (
    "aten.scaled_dot_product_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
    "aten._scaled_dot_product_attention_math_for_mps",
)


@_own(*_ATTENTION)
def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:  # (..., Tq, d), (..., Tk, d), (..., Tk, dv)
    return q.numel() * k.shape[-2] + q.shape[:-1].numel() * v.shape[-2] * v.shape[-1]


def _attention_elements(q: Tensor, k: Tensor, v: Tensor, *rest: Any, out: Any, **options: Any) -> int:
    # what the unfused path does: scale q and k, add the mask (the one tensor among the other arguments), softmax
    masked = any(isinstance(value, Tensor) for value in (*rest, *options.values()))
    return q.numel() + k.numel() + q.shape[:-1].numel() * k.shape[-2] * (2 if masked else 1)


_ELEMENTS.update(dict.fromkeys(_ATTENTION, _attention_elements))


def _fused_activation(*args: Any, out: Tensor, **_: Any) -> int:
    return 0 if "none" in [a for a in args if isinstance(a, str)] else out.numel()


_ELEMENTS["mkldnn._linear_pointwise"] = _fused_activation


@dataclass
class Tally:
    """Counts of one operation in one module."""

    calls: int = 0
    macs: int = 0
    element_ops: int = 0

    def add(self, other: Tally) -> None:
        """Add the counts of another tally to this one."""
        self.calls += other.calls
        self.macs += other.macs
        self.element_ops += other.element_ops


@dataclass
class Counts:
    """What a forward pass ran: (module path, operation) -> tally. The model itself has the path ''."""

    tallies: dict[tuple[str, str], Tally] = field(default_factory=lambda: defaultdict(Tally))

    def total(self, module: str = "", operation: str | None = None) -> Tally:
        """The sum over a module with all it contains, or over one operation in it."""
        total = Tally()
        for (path, name), tally in self.tallies.items():
            inside = not module or path == module or path.startswith(module + ".")
            if inside and operation in (None, name):
                total.add(tally)
        return total

    def by_operation(self) -> dict[str, Tally]:
        """Totals per operation, most MACs first."""
        totals: dict[str, Tally] = defaultdict(Tally)
        for (_, name), tally in self.tallies.items():
            totals[name].add(tally)
        return dict(sorted(totals.items(), key=lambda item: (-item[1].macs, -item[1].element_ops, item[0])))


class _CountingMode(TorchDispatchMode):
    """Adds every operation to the tally of the module on top of `stack`."""

    def __init__(self, counts: Counts, stack: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts, self.stack = counts, stack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func.overloadpacket)
        product = name in _MACS or func.overloadpacket in flop_registry
        free = not product and (name in _FREE or func.is_view or torch.Tag.inplace_view in func.tags)
        if not (product or free or name in _ARITHMETIC or torch.Tag.pointwise in func.tags):
            with self:  # an operation made of others (as seen under inference_mode): count those
                result = func.decompose(*args, **kwargs)
            if result is NotImplemented:
                raise UserError(
                    f"the operation {name} in module '{self.stack[-1] or '(model)'}' has no MAC formula: add one with "
                    f"hubert_eff.profiling.register_formula(torch.ops.{name})"
                )
            return result
        out = func(*args, **kwargs)
        tally = self.counts.tallies[self.stack[-1], name]
        tally.calls += 1
        if name in _MACS:
            tally.macs += int(_MACS[name](*args, out=out, **kwargs))
        elif func.overloadpacket in flop_registry:
            tally.macs += int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)) // 2
        elif not free:
            tally.element_ops += max((t.numel() for t in _tensors((args, kwargs, out))), default=0)
        if name in _ELEMENTS:
            tally.element_ops += _ELEMENTS[name](*args, out=out, **kwargs)
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@contextmanager
def count_operations(model: nn.Module) -> Iterator[Counts]:
    """Count what runs inside the `with` block: `with count_operations(model) as counts: model(x)`.

    Operations outside of any submodule of `model` are booked on the path ''. A module that is called several times adds up; one
    that has several parents is booked under the parent that called it. Nothing is left on the model afterwards.
    Raises `UserError` from inside the block for an operation without a formula.
    """
    paths: dict[nn.Module, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        paths[module].append(path)
    stack = [""]
    counts = Counts()

    def enter(module: nn.Module, _: Any) -> None:
        parent = stack[-1] + "." if stack[-1] else ""
        stack.append(next((path for path in paths[module] if path.startswith(parent)), paths[module][0]))

    def leave(module: nn.Module, *_: Any) -> None:
        stack.pop()

    hooks = []
    try:
        for module in paths:
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(leave, always_call=True))
        with _CountingMode(counts, stack):
            yield counts
    finally:
        for hook in hooks:
            hook.remove()
