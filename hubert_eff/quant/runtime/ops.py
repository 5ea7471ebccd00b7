"""Operations on packed bits, as torch sees them: `torch.ops.hubert_eff.*`, each with its meaning in plain torch, a kernel on the CPU, and
a fake implementation (shapes only) for tracing. Their MAC formulas stand with all others in profiling/formulas.py.

Bits lie in int32 words, the first element in the lowest bit, zeros after the last. A left operand is rows of words (..., M, W); a right
one panels (..., ceil(N / 16), W, 16), 16 outputs side by side. A bit of 1 stands for 1; one of 0 for -1 in a signed operand and in
all right ones, else for 0. Nothing here has a gradient.
"""

# M rows, K inputs, N outputs, W = ceil(K / 32) words, B batch, T frames, C channels, k kernel

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import loader

WORD, LANES = 32, 16
_library: Any = torch.library.Library("hubert_eff", "DEF")  # type: ignore[no-untyped-call]


def words_of(elements: int) -> int:
    """Words that hold so many bits."""
    return -(-elements // WORD)


def panels_of(outputs: int) -> int:
    """Panels that hold so many outputs."""
    return -(-outputs // LANES)


# -- in plain torch ---------------------------------------------------------------------------------------------------------------------


def words_from(bits: Tensor) -> Tensor:
    """bool (..., K) -> int32 (..., W)."""
    padded = torch.unflatten(F.pad(bits, (0, -bits.size(-1) % WORD)), -1, (-1, WORD)).to(torch.int64)
    words = (padded << torch.arange(WORD, device=bits.device)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def bits_from(words: Tensor, elements: int) -> Tensor:
    """int32 (..., W) -> bool (..., K): the inverse of `words_from`."""
    shifts = torch.arange(WORD, device=words.device, dtype=torch.int32)
    bits: Tensor = words.unsqueeze(-1) >> shifts & 1
    return bits.bool().flatten(-2)[..., :elements]


def panels_from(words: Tensor) -> Tensor:
    """Rows of words (..., N, W) -> panels (..., ceil(N / 16), W, 16)."""
    padded = F.pad(words, (0, 0, 0, -words.size(-2) % LANES))
    return torch.unflatten(padded, -2, (-1, LANES)).transpose(-1, -2).contiguous()


def rows_from(panels: Tensor, outputs: int) -> Tensor:
    """The inverse of `panels_from`."""
    return panels.transpose(-1, -2).flatten(-3, -2)[..., :outputs, :]


def _signs(bits: Tensor) -> Tensor:
    return bits.float().mul_(2).sub_(1)


def _bits(x: Tensor, move: Tensor | None, factor: Tensor | None, limit: Tensor | None) -> Tensor:
    y = x.float()
    if factor is not None:
        y = y * factor
    if move is not None:
        y = y + move.float()
    return y > (0.0 if limit is None else limit.float())


def _sums(a: Tensor, b: Tensor, outputs: int, inputs: int, signed: bool) -> Tensor:
    elements = a.size(-1) * WORD
    left, right = bits_from(a, elements), _signs(bits_from(rows_from(b, outputs), elements))
    return _signs(left) @ right.mT - (elements - inputs) if signed else left.float() @ right.mT  # bits past the end are equal


def _scaled(y: Tensor, scale: Tensor | None, size: Tensor | None, bias: Tensor | None, half: bool) -> Tensor:
    if scale is not None and size is not None:
        y = y * (scale.float() * size.float())
    elif scale is not None or size is not None:
        y = y * (size if scale is None else scale).float()  # type: ignore[union-attr]
    if bias is not None:
        y = y + bias.float()
    return y.bfloat16() if half else y


# -- calls of the kernels ---------------------------------------------------------------------------------------------------------------


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _floats(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.float().contiguous()


def _words(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.int32:
        raise TypeError(f"packed bits are int32 words, not {tensor.dtype}")
    return tensor.contiguous()


def _readable(x: Tensor) -> Tensor:
    """x in a dtype that the kernels read, with adjacent channels and at most three leading dimensions."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        x = x.float()
    if x.dim() > loader.DIMS + 1:
        x = x.flatten(0, x.dim() - loader.DIMS - 1)
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


def _leading(values: Sequence[int], fill: int) -> Any:
    return (ctypes.c_int64 * loader.DIMS)(*[fill] * (loader.DIMS - len(values)), *values)


def _expect(holds: bool, what: str, *found: object) -> None:
    """Kernels read memory by these shapes: refuse others. `found` is formatted into the message only then: a chunk's product is short."""
    if not holds:
        raise ValueError(what.format(*found) if found else what)


def _pack(
    kernel: loader.Kernel, x: Tensor, move: Tensor | None, factor: Tensor | None, limit: Tensor | None, shape: Sequence[int], panels: bool
) -> Tensor:
    whole = x.shape
    x = _readable(x)
    _expect(limit is None or limit.numel() == 1, "the limit must be one number")
    moves, factors = _floats(move), _floats(factor)
    if moves is not None:
        moves = moves.expand(whole)
        moves = moves.flatten(0, moves.dim() - loader.DIMS - 1) if moves.dim() > loader.DIMS + 1 else moves
        moves = moves if moves.stride(-1) == 1 or moves.size(-1) == 1 else moves.contiguous()
    if factors is not None:
        _expect(factors.dim() == 0 or factors.size(-1) == 1, "a factor must be constant along a row")
        factors = factors.expand(*whole[:-1], 1)
        factors = factors.flatten(0, factors.dim() - loader.DIMS - 1) if factors.dim() > loader.DIMS + 1 else factors
    limits = _floats(limit)
    out = x.new_empty(shape, dtype=torch.int32)
    task = loader.Pack(
        x.data_ptr(), _pointer(moves), _pointer(factors), _pointer(limits), _leading(x.shape[:-1], 1), _leading(x.stride()[:-1], 0),
        _leading(() if moves is None else moves.stride()[:-1], 0), _leading(() if factors is None else factors.stride()[:-1], 0),
        x.size(-1), out.data_ptr(), x.dtype == torch.bfloat16,
    )  # fmt: skip
    if out.numel():
        kernel.library.hubert_eff_pack(kernel.functions, ctypes.byref(task), panels, torch.get_num_threads())
    return out


def _multiply(
    kernel: loader.Kernel, a: Tensor, b: Tensor, outputs: int, inputs: int, signed: bool, scale: Tensor | None, size: Tensor | None,
    bias: Tensor | None, limit: Tensor | None, half: bool,
) -> Tensor:  # fmt: skip
    words, shared = a.size(-1), b.dim() == 3
    rows, batch = (math.prod(a.shape[:-1]), 1) if shared else (a.size(-2), math.prod(a.shape[:-2]))
    _expect(words >= words_of(inputs), "rows of {} words for {} inputs", words, inputs)
    lead = () if shared else a.shape[:-2]
    _expect(b.shape == (*lead, panels_of(outputs), words, LANES), "panels {} for rows {}", b.shape, a.shape)
    _expect(scale is None or scale.numel() == 1, "the scale must be one number")
    _expect(size is None or size.numel() in (1, outputs), "one size, or as many as outputs")
    _expect(bias is None or bias.numel() == outputs, "as many biases as outputs")
    _expect(limit is None or (limit.numel() == outputs and limit.dtype == torch.int32), "as many limits, int32, as outputs")
    a, b, scale, size, bias = _words(a), _words(b), _floats(scale), _floats(size), _floats(bias)
    limit = None if limit is None else limit.contiguous()
    if limit is None:
        out = a.new_empty(*a.shape[:-1], outputs, dtype=torch.bfloat16 if half else torch.float32)
    else:
        out = a.new_empty(*a.shape[:-1], words_of(outputs))
    task = loader.Product(
        a.data_ptr(), b.data_ptr(), _pointer(scale), _pointer(size), _pointer(bias), _pointer(limit), out.data_ptr(), batch, rows, outputs,
        inputs, words, 1 if size is None else size.numel(), signed, half,
    )  # fmt: skip
    if out.numel():
        kernel = loader.for_product(kernel, rows, inputs)
        kernel.library.hubert_eff_product(kernel.functions, ctypes.byref(task), torch.get_num_threads())
    return out


# -- operations -------------------------------------------------------------------------------------------------------------------------

Op = Callable[..., Tensor]


def _operation(schema: str, shape: Callable[..., Tensor]) -> Callable[[Op], Op]:
    """Define an operation by its schema, its meaning in plain torch (what is decorated) and its result's shape."""

    def define(meaning: Op) -> Op:
        name = schema.partition("(")[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, meaning, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hubert_eff::{name}", shape, lib=_library)
        return getattr(torch.ops.hubert_eff, name).default  # type: ignore[no-any-return]

    return define


def _pack_shape(x: Tensor, move: Tensor | None = None, factor: Tensor | None = None, limit: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], words_of(x.size(-1)), dtype=torch.int32)


@_operation("pack(Tensor x, Tensor? move=None, Tensor? factor=None, Tensor? limit=None) -> Tensor", _pack_shape)
def pack(x: Tensor, move: Tensor | None = None, factor: Tensor | None = None, limit: Tensor | None = None) -> Tensor:
    """Bits of x factor + move > limit, x (..., M, K) -> (..., M, W); factor (..., M, 1) and move as they broadcast to x, limit (1,)."""
    kernel = loader.current() if x.device.type == "cpu" else None
    if kernel is None:
        return words_from(_bits(x, move, factor, limit))
    return _pack(kernel, x, move, factor, limit, (*x.shape[:-1], words_of(x.size(-1))), False)


def _columns_shape(x: Tensor, move: Tensor | None = None, limit: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-2], panels_of(x.size(-1)), words_of(x.size(-2)), LANES, dtype=torch.int32)


@_operation("pack_columns(Tensor x, Tensor? move=None, Tensor? limit=None) -> Tensor", _columns_shape)
def pack_columns(x: Tensor, move: Tensor | None = None, limit: Tensor | None = None) -> Tensor:
    """The bits of `pack` along the frames of x (..., T, C): panels (..., ceil(C / 16), ceil(T / 32), 16) with channels as outputs."""
    kernel = loader.current() if x.device.type == "cpu" else None
    if kernel is None:
        return panels_from(words_from(_bits(x, move, None, limit).mT))
    lead = x.shape[:-2]
    x = x.unsqueeze(0) if x.dim() == 2 else x
    return _pack(kernel, x, move, None, limit, (*lead, panels_of(x.size(-1)), words_of(x.size(-2)), LANES), True)


def _product_shape(
    a: Tensor, b: Tensor, outputs: int, inputs: int, signed: bool, scale: Tensor | None = None, size: Tensor | None = None,
    bias: Tensor | None = None, half: bool = False,
) -> Tensor:  # fmt: skip
    return a.new_empty(*a.shape[:-1], outputs, dtype=torch.bfloat16 if half else torch.float32)


@_operation(
    "product(Tensor a, Tensor b, SymInt outputs, SymInt inputs, bool signed, Tensor? scale=None, Tensor? size=None, Tensor? bias=None, "
    "bool half=False) -> Tensor",
    _product_shape,
)
def product(
    a: Tensor, b: Tensor, outputs: int, inputs: int, signed: bool, scale: Tensor | None = None, size: Tensor | None = None,
    bias: Tensor | None = None, half: bool = False,
) -> Tensor:  # fmt: skip
    """Sums of products, an integer each, times (scale size), plus bias: a (..., M, W), b (..., ceil(N / 16), W, 16) -> (..., M, N).

    b has the leading dimensions of a, or none, as a weight has. scale (1,), size (N,) or (1,), bias (N,). half: bfloat16 results, else
    float32. W may exceed ceil(K / 32): what is not one of the K inputs is 0 on both sides, wherever it stands.
    """
    kernel = loader.current() if a.device.type == "cpu" else None
    if kernel is None:
        return _scaled(_sums(a, b, outputs, inputs, signed), scale, size, bias, half)
    return _multiply(kernel, a, b, outputs, inputs, signed, scale, size, bias, None, half)


def _bits_shape(a: Tensor, b: Tensor, outputs: int, inputs: int, limit: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], words_of(outputs))


@_operation("product_bits(Tensor a, Tensor b, SymInt outputs, SymInt inputs, Tensor limit) -> Tensor", _bits_shape)
def product_bits(a: Tensor, b: Tensor, outputs: int, inputs: int, limit: Tensor) -> Tensor:
    """Bits of a `product` that is not written, (..., M, ceil(N / 32)): 1 where at most limit (N,) of the K bits of both sides differ."""
    kernel = loader.current() if a.device.type == "cpu" else None
    if kernel is None:
        return words_from((inputs - _sums(a, b, outputs, inputs, True)) <= 2 * limit)
    return _multiply(kernel, a, b, outputs, inputs, True, None, None, None, limit, False)


def _depthwise_shape(
    x: Tensor, valid: Tensor, weight: Tensor, channels: int, kernel: int, stride: int, frames: int, signed: bool,
    scale: Tensor | None = None, size: Tensor | None = None, bias: Tensor | None = None, half: bool = False,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.size(0), frames, channels, dtype=torch.bfloat16 if half else torch.float32)


@_operation(
    "depthwise(Tensor x, Tensor valid, Tensor weight, SymInt channels, SymInt kernel, SymInt stride, SymInt frames, bool signed, "
    "Tensor? scale=None, Tensor? size=None, Tensor? bias=None, bool half=False) -> Tensor",
    _depthwise_shape,
)
def depthwise(
    x: Tensor, valid: Tensor, weight: Tensor, channels: int, kernel: int, stride: int, frames: int, signed: bool,
    scale: Tensor | None = None, size: Tensor | None = None, bias: Tensor | None = None, half: bool = False,
) -> Tensor:  # fmt: skip
    """Depthwise convolution of x, panels of `pack_columns` (B, ceil(C / 16), W, 16), with filters (ceil(C / 16), ceil(k / 32), 16).

    Output t < frames sees inputs t stride ... t stride + k - 1, of which those count whose bit in valid (B, W) is 1 -> (B, frames, C).
    """
    length = (frames - 1) * stride + kernel
    native = loader.current() if x.device.type == "cpu" else None
    if native is None:
        bits, real = bits_from(rows_from(x, channels), x.size(-2) * WORD), bits_from(valid, x.size(-2) * WORD)
        values = (_signs(bits) if signed else bits.float()).masked_fill_(~real.unsqueeze(1), 0.0)  # (B, C, T)
        windows = F.pad(values, (0, max(0, length - values.size(-1))))[..., :length]
        filters = _signs(bits_from(rows_from(weight, channels), kernel)).unsqueeze(1)
        return _scaled(F.conv1d(windows, filters, stride=stride, groups=channels).mT, scale, size, bias, half).contiguous()
    batch, words = x.size(0), x.size(-2)
    _expect(x.shape == (batch, panels_of(channels), words, LANES), f"panels {tuple(x.shape)} for {channels} channels")
    _expect(valid.shape == (batch, words), f"valid frames {tuple(valid.shape)} for panels {tuple(x.shape)}")
    _expect(weight.shape == (panels_of(channels), words_of(kernel), LANES), f"filters {tuple(weight.shape)} for {channels} channels")
    _expect(scale is None or scale.numel() == 1, "the scale must be one number")
    _expect(size is None or size.numel() in (1, channels), "one size, or as many as channels")
    _expect(bias is None or bias.numel() == channels, "as many biases as channels")
    x, valid, weight, scale, size, bias = _words(x), _words(valid), _words(weight), _floats(scale), _floats(size), _floats(bias)
    out = x.new_empty(batch, frames, channels, dtype=torch.bfloat16 if half else torch.float32)
    task = loader.Depthwise(
        x.data_ptr(), valid.data_ptr(), weight.data_ptr(), _pointer(scale), _pointer(size), _pointer(bias), out.data_ptr(), batch, frames,
        channels, words, kernel, stride, 1 if size is None else size.numel(), signed, half,
    )  # fmt: skip
    if out.numel():
        native.library.hubert_eff_depthwise(native.functions, ctypes.byref(task), torch.get_num_threads())
    return out
