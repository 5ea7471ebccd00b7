"""The cost of each operation: MAC formulas of products, and lists of arithmetic and free operations.

Formulas come from `torch.utils.flop_counter` (1 MAC = 2 FLOP), or from this file if torch has none. Operations are looked up by
name ("aten.mm", without the overload), so names that the running torch lacks do no harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from ..errors import UserError
from ..layers.bits import Bits, attention_cost, offsets_seen

Formula = Callable[..., int]
F = TypeVar("F", bound=Formula)

MATRIX, ATTENTION, NORM, ELEMENTWISE, COPY = "matrix product", "attention", "norm", "element-wise", "copy"
CONVOLUTION, GROUPED, DEPTHWISE = "convolution", "grouped convolution", "depthwise convolution"
KINDS = (MATRIX, CONVOLUTION, GROUPED, DEPTHWISE, ATTENTION, NORM, ELEMENTWISE, COPY)

BLOCK = 128  # queries of packed relative attention that count together, as in the simulation

_MACS: dict[str, Formula] = {}  # the operation's own arguments, and out=result -> MACs
_KIND: dict[str, str] = {}  # products that are not matrix products
_BITS: dict[str, Bits] = {}  # products that always run in these widths
_ELEMENTS: dict[str, Formula] = {}  # arguments as above -> element operations that are fused into a product


def _names(text: str) -> frozenset[str]:
    return frozenset("aten." + name for name in text.split())


_NORMS = _names(
    "native_layer_norm native_group_norm native_batch_norm cudnn_batch_norm miopen_batch_norm batch_norm_elemt "
    "_native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_no_update "
    "_fused_rms_norm _weight_norm_interface linalg_vector_norm norm"
)
_ARITHMETIC = _names(
    # activations and comparisons without torch's pointwise tag in every version
    "gelu gelu_ glu relu relu_ softplus prelu floor_divide clamp_min clamp_max isnan isinf isfinite "
    # softmax and reductions
    "softmax log_softmax _softmax _log_softmax _safe_softmax logsumexp sum mean std var std_mean var_mean prod amax amin aminmax "
    "max min argmax argmin any all cumsum cumprod"
) | {"hubert_eff.pack", "hubert_eff.pack_columns"}
_FREE = _names(
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
) | {"mkldnn._reorder_linear_weight", "prim.device"}


def register_formula(op: torch._ops.OpOverloadPacket, kind: str = MATRIX) -> Callable[[F], F]:
    """Give a custom operation a MAC formula: `@register_formula(torch.ops.mylib.product)`.

    The formula is called with the operation's arguments and its result as `out=`, and returns MACs as an integer. `kind` is the
    column that they are shown in; an operation of kind element-wise or norm also counts its elements, and returns 0 MACs if it
    multiplies no pairs. The widths of the operands are declared by the module that runs the operation (layers/bits.py).
    Raises `UserError` for anything that is not an operation (`torch.ops.<library>.<name>`), for an operation that has a formula, and for
    an unknown kind.
    """
    if not isinstance(op, torch._ops.OpOverloadPacket):
        raise UserError(f"register_formula takes an operation such as torch.ops.mylib.product, not {op!r}")
    if kind not in KINDS:
        raise UserError(f"kind={kind!r} of the operation {op} is not one of {', '.join(KINDS)}")
    name = str(op)
    if name in _MACS or op in flop_registry:
        raise UserError(f"the operation {name} has a MAC formula already")

    def register(formula: F) -> F:
        _MACS[name], _KIND[name] = formula, kind
        return formula

    return register


@dataclass(frozen=True)
class Operation:
    """One call of an operation: its name without the overload, its kind, and its counts."""

    name: str
    kind: str
    product: Formula | None  # arguments, and out=result -> MACs
    arithmetic: bool
    bits: Bits | None  # widths that the operation itself implies

    def macs(self, args: Any, kwargs: Any, out: Any) -> int:
        """Multiply-accumulates of the call."""
        return self.product(*args, out=out, **kwargs) if self.product else 0

    def element_ops(self, args: Any, kwargs: Any, out: Any) -> int:
        """Element operations of the call: elements of its largest tensor, or those fused into a product."""
        if self.arithmetic:
            largest = max((t.numel() for t in _tensors((args, kwargs, out))), default=0)
            return largest if largest > 1 else 0  # a single number, such as a scale for each block of the work
        return _ELEMENTS[self.name](*args, out=out, **kwargs) if self.name in _ELEMENTS else 0


def classify(func: Any, args: Any, kwargs: Any) -> Operation | None:
    """Classify the call of an operator (`torch.ops.*.*.<overload>`); None if it is unknown."""
    packet = func.overloadpacket
    name = str(packet)
    if name in _MACS:
        kind = _KIND.get(name, MATRIX)
        return Operation(name, kind, _MACS[name], kind in (NORM, ELEMENTWISE), _BITS.get(name))
    if packet in flop_registry:
        return Operation(name, _product_kind(func, name, args, kwargs), _torch_formula(packet), False, None)
    if name in _FREE or func.is_view or torch.Tag.inplace_view in func.tags:
        return Operation(name, COPY, None, False, None)
    if name in _NORMS:
        return Operation(name, NORM, None, True, None)
    if name in _ARITHMETIC or torch.Tag.pointwise in func.tags:
        return Operation(name, ELEMENTWISE, None, True, None)
    return None


def _torch_formula(packet: Any) -> Formula:
    flops = flop_registry[packet]
    return lambda *args, out, **kwargs: int(flops(*args, **kwargs, out_val=out)) // 2


def _product_kind(func: Any, name: str, args: Any, kwargs: Any) -> str:
    if "attention" in name:
        return ATTENTION
    if "convolution" not in name:
        return MATRIX
    given = {a.name: args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(func._schema.arguments)}
    groups, x = given["groups"], given["input"]
    if groups == 1:
        return CONVOLUTION
    return DEPTHWISE if groups == x.shape[1] else GROUPED


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


# -- formulas that torch has not -----------------------------------------------------------------------------------------


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


_INT8 = ("quantized.linear_dynamic", "quantized.linear_relu_dynamic")
_BITS.update(dict.fromkeys(_INT8, (8, 8)))  # float in and out, with an int8 product between


@_own(*_INT8)
def _int8_linear(x: Tensor, *_: Any, out: Tensor, **__: Any) -> int:
    return x.numel() * out.shape[-1]


@_own("aten._fft_r2c")
def _real_fft(x: Tensor, *_: Any, **__: Any) -> int:  # (..., n): n / 4 log2 n complex products of four real ones
    return round(x.numel() * math.log2(x.shape[-1]))


@_own("aten.mv", "aten.dot", "aten.vdot")
def _matrix_vector(matrix: Tensor, *_: Any, **__: Any) -> int:  # (m, n) or (n,), (n,)
    return matrix.numel()


@_own("aten.addmv")
def _add_matrix_vector(_: Tensor, matrix: Tensor, *__: Any, **___: Any) -> int:
    return matrix.numel()


@_own("hubert_eff.product", "hubert_eff.product_bits")
def _packed_product(rows: Tensor, _: Tensor, outputs: int, inputs: int, *__: Any, **___: Any) -> int:  # (..., M, words)
    return rows.shape[:-1].numel() * outputs * inputs


@_own("hubert_eff.attention")
def _packed_attention(q: Tensor, _: Tensor, keys: int, inputs: int, *__: Any, **___: Any) -> int:  # (B, H, n, words)
    return q.shape[:-1].numel() * keys * inputs


@_own("hubert_eff.relative_attention")
def _packed_relative(
    q: Tensor, _: Tensor, __: Tensor, ___: Tensor, keys: int, inputs: int, positions: int, *____: Any, **_____: Any
) -> int:
    places = offsets_seen(q.size(2), keys, BLOCK) * positions
    return q.shape[:-1].numel() * keys * inputs + q.shape[:2].numel() * places


@_own("hubert_eff.blocked_attention")
def _packed_blocks(q: Tensor, _: Tensor, __: Tensor, keys: int, shared: int, inputs: int, *___: Any, **____: Any) -> int:
    return q.shape[:-1].numel() * (keys + shared) * inputs


_KIND["hubert_eff.depthwise"] = DEPTHWISE


@_own("hubert_eff.depthwise")
def _packed_depthwise(_: Tensor, __: Tensor, ___: Tensor, channels: int, kernel: int, *____: Any, out: Tensor, **_____: Any) -> int:
    return out.numel() * kernel


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
_KIND.update(dict.fromkeys(_ATTENTION, ATTENTION))


@_own(*_ATTENTION)
def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return attention_cost(q, k, v, masked=False).macs


def _attention_elements(q: Tensor, k: Tensor, v: Tensor, *rest: Any, out: Any, **options: Any) -> int:
    # the mask is the one tensor among the other arguments
    return attention_cost(q, k, v, any(isinstance(value, Tensor) for value in (*rest, *options.values()))).element_ops


_ELEMENTS.update(dict.fromkeys(_ATTENTION, _attention_elements))


def _fused_activation(*args: Any, out: Tensor, **_: Any) -> int:
    return 0 if "none" in [a for a in args if isinstance(a, str)] else out.numel()


_ELEMENTS["mkldnn._linear_pointwise"] = _fused_activation
_ELEMENTS["quantized.linear_relu_dynamic"] = _fused_activation
