"""Operations on packed bits, `torch.ops.hubert_eff.*`: each has a definition in plain torch, a kernel on the CPU, and a fake implementation
(shapes only) for tracing. Their MAC formulas are in profiling/formulas.py.

Bits lie in int32 words, the first element in the lowest bit, zeros after the last. A left operand is rows of words (..., M, W); a right
one panels (..., ceil(N / 16), W, 16), 16 outputs side by side. A bit of 1 stands for 1. A bit of 0 stands for -1 in a signed operand and in
every right operand, otherwise for 0. Nothing here has a gradient.
"""

# M rows, K inputs, N outputs, W = ceil(K / 32) words, B batch, T frames, C channels, k kernel
# attention: H heads, n queries, N blocks of L queries, T keys, G shared keys, E words of a position

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import loader
from ..integer_softmax import HIDDEN, attended_

WORD, LANES = 32, 16
MOST = 239  # largest distance in bits that the attention kernels can hold
QUERIES = 128  # queries whose costs are in memory together in plain torch
_library: Any = torch.library.Library("hubert_eff", "DEF")  # type: ignore[no-untyped-call]


def words_of(elements: int) -> int:
    """Number of words for so many bits."""
    return -(-elements // WORD)


def panels_of(outputs: int) -> int:
    """Number of panels for so many outputs."""
    return -(-outputs // LANES)


# -- in plain torch ---------------------------------------------------------------------------------------------------------------------


def words_from(bits: Tensor) -> Tensor:
    """bool (..., K) -> int32 (..., W)."""
    if bits.is_meta:  # only the shape, as in `panels_from`: torch would import for seconds to infer it
        return torch.empty((*bits.shape[:-1], words_of(bits.size(-1))), dtype=torch.int32, device="meta")
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
    if words.is_meta:
        return words.new_empty((*words.shape[:-2], panels_of(words.size(-2)), words.size(-1), LANES))
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
    """Refuse other shapes, since kernels read memory by them. `found` is formatted into the message only then, which keeps calls fast."""
    if not holds:
        raise ValueError(what.format(*found) if found else what)


def _pack(
    kernel: loader.Kernel, x: Tensor, move: Tensor | None, factor: Tensor | None, limit: Tensor | None, shape: Sequence[int], panels: bool,
    before: int = 0,
) -> Tensor:  # fmt: skip
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
        x.size(-1), out.data_ptr(), x.dtype == torch.bfloat16, before, shape[-2] if panels else shape[-1],
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
    """Define an operation by its schema, its meaning in plain torch (the decorated function) and the shape of its result."""

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


def _columns_shape(x: Tensor, move: Tensor | None = None, limit: Tensor | None = None, before: int = 0, after: int = 0) -> Tensor:
    return x.new_empty(*x.shape[:-2], panels_of(x.size(-1)), words_of(before + x.size(-2) + after), LANES, dtype=torch.int32)


@_operation("pack_columns(Tensor x, Tensor? move=None, Tensor? limit=None, SymInt before=0, SymInt after=0) -> Tensor", _columns_shape)
def pack_columns(x: Tensor, move: Tensor | None = None, limit: Tensor | None = None, before: int = 0, after: int = 0) -> Tensor:
    """The bits of `pack` along the frames of x (..., T, C), with a number of 0 bits before and after them.

    -> panels (..., ceil(C / 16), ceil((before + T + after) / 32), 16) with channels as outputs.
    """
    kernel = loader.current() if x.device.type == "cpu" else None
    if kernel is None:
        return panels_from(words_from(F.pad(_bits(x, move, None, limit).mT, (before, after))))
    lead = x.shape[:-2]
    x = x.unsqueeze(0) if x.dim() == 2 else x
    shape = (*lead, panels_of(x.size(-1)), words_of(before + x.size(-2) + after), LANES)
    return _pack(kernel, x, move, None, limit, shape, True, before)


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
    """Integer sums of products, times (scale size), plus bias: a (..., M, W), b (..., ceil(N / 16), W, 16) -> (..., M, N).

    b has the leading dimensions of a or, like a weight, none. scale (1,), size (N,) or (1,), bias (N,). half: bfloat16 results instead of
    float32. W may exceed ceil(K / 32); bits beyond the K inputs are 0 on both sides, wherever they are.
    """
    kernel = loader.current() if a.device.type == "cpu" else None
    if kernel is None:
        return _scaled(_sums(a, b, outputs, inputs, signed), scale, size, bias, half)
    return _multiply(kernel, a, b, outputs, inputs, signed, scale, size, bias, None, half)


def _bits_shape(a: Tensor, b: Tensor, outputs: int, inputs: int, limit: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], words_of(outputs))


@_operation("product_bits(Tensor a, Tensor b, SymInt outputs, SymInt inputs, Tensor limit) -> Tensor", _bits_shape)
def product_bits(a: Tensor, b: Tensor, outputs: int, inputs: int, limit: Tensor) -> Tensor:
    """Bits of a `product` that is not stored, (..., M, ceil(N / 32)): 1 where at most limit (N,) of the K bits of both sides differ."""
    kernel = loader.current() if a.device.type == "cpu" else None
    if kernel is None:
        return words_from((inputs - _sums(a, b, outputs, inputs, True)) <= 2 * limit)
    return _multiply(kernel, a, b, outputs, inputs, True, None, None, None, limit, False)


def _depthwise_shape(
    x: Tensor, valid: Tensor | None, weight: Tensor, channels: int, kernel: int, stride: int, frames: int, signed: bool,
    scale: Tensor | None = None, size: Tensor | None = None, bias: Tensor | None = None, half: bool = False, begin: int = 0, end: int = 0,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.size(0), frames, channels, dtype=torch.bfloat16 if half else torch.float32)


@_operation(
    "depthwise(Tensor x, Tensor? valid, Tensor weight, SymInt channels, SymInt kernel, SymInt stride, SymInt frames, bool signed, "
    "Tensor? scale=None, Tensor? size=None, Tensor? bias=None, bool half=False, SymInt begin=0, SymInt end=0) -> Tensor",
    _depthwise_shape,
)
def depthwise(
    x: Tensor, valid: Tensor | None, weight: Tensor, channels: int, kernel: int, stride: int, frames: int, signed: bool,
    scale: Tensor | None = None, size: Tensor | None = None, bias: Tensor | None = None, half: bool = False, begin: int = 0, end: int = 0,
) -> Tensor:  # fmt: skip
    """Depthwise convolution of x, panels of `pack_columns` (B, ceil(C / 16), W, 16), with filters (ceil(C / 16), ceil(k / 32), 16).

    Output t < frames sees inputs t stride ... t stride + k - 1, of which those count whose bit in valid (B, W) is 1, or
    without valid inputs begin ... end - 1 -> (B, frames, C).
    """
    length = (frames - 1) * stride + kernel
    native = loader.current() if x.device.type == "cpu" else None
    if native is None:
        bits = bits_from(rows_from(x, channels), x.size(-2) * WORD)
        places = torch.arange(x.size(-2) * WORD, device=x.device)
        real = ((places >= begin) & (places < end)).expand(x.size(0), -1) if valid is None else bits_from(valid, x.size(-2) * WORD)
        values = (_signs(bits) if signed else bits.float()).masked_fill_(~real.unsqueeze(1), 0.0)  # (B, C, T)
        windows = F.pad(values, (0, max(0, length - values.size(-1))))[..., :length]
        filters = _signs(bits_from(rows_from(weight, channels), kernel)).unsqueeze(1)
        return _scaled(F.conv1d(windows, filters, stride=stride, groups=channels).mT, scale, size, bias, half).contiguous()
    batch, words = x.size(0), x.size(-2)
    _expect(x.shape == (batch, panels_of(channels), words, LANES), f"panels {tuple(x.shape)} for {channels} channels")
    if valid is None:
        _expect(0 <= begin <= end <= words * WORD, f"frames {begin} to {end} of panels {tuple(x.shape)}")
    else:
        _expect(valid.shape == (batch, words), f"valid frames {tuple(valid.shape)} for panels {tuple(x.shape)}")
        valid = _words(valid)
    _expect(weight.shape == (panels_of(channels), words_of(kernel), LANES), f"filters {tuple(weight.shape)} for {channels} channels")
    _expect(scale is None or scale.numel() == 1, "the scale must be one number")
    _expect(size is None or size.numel() in (1, channels), "one size, or as many as channels")
    _expect(bias is None or bias.numel() == channels, "as many biases as channels")
    x, weight, scale, size, bias = _words(x), _words(weight), _floats(scale), _floats(size), _floats(bias)
    out = x.new_empty(batch, frames, channels, dtype=torch.bfloat16 if half else torch.float32)
    task = loader.Depthwise(
        x.data_ptr(), _pointer(valid), weight.data_ptr(), _pointer(scale), _pointer(size), _pointer(bias), out.data_ptr(), batch, frames,
        channels, words, kernel, stride, begin, end, 1 if size is None else size.numel(), signed, half,
    )  # fmt: skip
    if out.numel():
        native.library.hubert_eff_depthwise(native.functions, ctypes.byref(task), torch.get_num_threads())
    return out


def _join_shape(kept: Tensor, frames: int, surplus: int, more: Tensor, count: int) -> Tensor:
    return kept.new_empty(*kept.shape[:-2], words_of(frames - surplus + count), LANES)


@_operation("join_columns(Tensor kept, SymInt frames, SymInt surplus, Tensor more, SymInt count) -> Tensor", _join_shape)
def join_columns(kept: Tensor, frames: int, surplus: int, more: Tensor, count: int) -> Tensor:
    """Panels of `pack_columns` of `frames` frames, (..., P, ceil(T / 32), 16), from frame `surplus` on, followed by `count` more."""
    kernel = loader.current() if kept.device.type == "cpu" else None
    if kernel is None:
        before, behind = (bits_from(part.mT, part.size(-2) * WORD) for part in (kept, more))  # (..., P, 16, T)
        return words_from(torch.cat((before[..., surplus:frames], behind[..., :count]), -1)).mT.contiguous()
    _expect(0 <= surplus <= frames, f"{surplus} of {frames} frames cannot be left out")
    for panels, length in ((kept, frames), (more, count)):
        shape = (*kept.shape[:-2], words_of(length), LANES)
        _expect(panels.shape == shape, f"panels {tuple(panels.shape)} are not {shape}")
    kept, more = _words(kept), _words(more)
    out = kept.new_empty(*kept.shape[:-2], words_of(frames - surplus + count), LANES)
    task = loader.Join(
        kept.data_ptr(), more.data_ptr(), out.data_ptr(), math.prod(kept.shape[:-2]), frames, surplus, kept.size(-2), more.size(-2),
        out.size(-2),
    )  # fmt: skip
    if out.numel():
        kernel.library.hubert_eff_join_columns(ctypes.byref(task))
    return out


def _distances(rows: Tensor, panels: Tensor, outputs: int, inputs: int) -> Tensor:
    return torch.rsub(_sums(rows, panels, outputs, inputs, True), inputs).to(torch.int32) >> 1


def _seen(seen: Tensor | None, keys: int) -> Tensor | None:
    """Words (B, W) or (B, n, W) of visible keys as a mask (B, 1, 1 or n, T)."""
    return None if seen is None else bits_from(seen, keys).view(seen.size(0), 1, -1, keys)


def _attended(costs: Tensor, seen: Tensor | None, threshold: Tensor) -> Tensor:
    """Words of costs (..., n, keys), of which bool `seen` (..., 1 or n, keys) are visible."""
    if seen is not None:
        costs = costs.masked_fill_(~seen, HIDDEN)
    return words_from(attended_(costs.contiguous(), costs.size(-1) if seen is None else seen.sum(-1, keepdim=True), threshold).bool())


def _by_key(by_offset: Tensor, keys: int, start: int) -> Tensor:
    """Distances (B, H, n, 2T - 1) to all offsets as those (B, H, n, T) to the offsets of the keys, of queries from `start` on."""
    place = torch.arange(start, start + by_offset.size(2), device=by_offset.device)
    column = keys - 1 - place.unsqueeze(1) + torch.arange(keys, device=by_offset.device)
    return by_offset.gather(-1, column.expand(*by_offset.shape[:2], -1, -1))


def _native(q: Tensor, *inputs: int) -> loader.Kernel | None:
    """The kernel for an attention; distances must fit into its bytes."""
    return loader.current() if q.device.type == "cpu" and max(inputs) <= MOST else None


def _attend(
    kernel: loader.Kernel, q: Tensor, k: Tensor, shared: Tensor | None, p: Tensor | None, offsets: Tensor | None, keys: int,
    shared_keys: int, inputs: int, cost: Tensor, threshold: Tensor, seen: Tensor | None, shared_seen: Tensor | None, start: int,
    window: int,
) -> Tensor:  # fmt: skip
    lead, (n, words), blocks = q.shape[:-2], q.shape[-2:], math.prod(q.shape[2:-2])
    batch, heads = q.shape[:2]
    _expect(words >= words_of(inputs), f"rows of {words} words for {inputs} inputs")
    _expect(k.shape == (*lead, panels_of(keys), words, LANES), f"panels {tuple(k.shape)} of {keys} keys for queries {tuple(q.shape)}")
    by_query = seen is not None and shared is None and seen.dim() == 3
    visible = (batch, *((n,) if by_query else lead[2:]), words_of(keys))
    _expect(seen is None or seen.shape == visible, "visible keys must be words (B, ceil(T / 32)), or (B, n, ceil(T / 32))")
    if shared is not None:
        _expect(shared.shape == (*lead[:2], panels_of(shared_keys), words, LANES), f"panels {tuple(shared.shape)} of {shared_keys} keys")
        _expect(
            shared_seen is None or shared_seen.shape == (batch, words_of(shared_keys)),
            "visible shared keys must be words (B, ceil(G / 32))",
        )
    if p is not None and offsets is not None:
        _expect(p.shape[:-1] == q.shape[:-1], f"positions {tuple(p.shape)} for queries {tuple(q.shape)}")
        _expect(offsets.shape == (heads, panels_of(2 * keys - 1), p.size(-1), LANES), f"offsets {tuple(offsets.shape)} for {keys} keys")
        _expect(0 <= start <= keys - n, f"queries {start} ... {start + n - 1} of {keys} keys")
    _expect(cost.dtype == torch.int32 and cost.numel() == (1 if p is None else 2), "one cost, int32, for each distance")
    _expect(threshold.numel() == 1, "the threshold must be one number")
    given = [None if t is None else _words(t) for t in (q, k, shared, seen, shared_seen, p, offsets, cost)]
    limit = _floats(threshold)
    out = q.new_empty(*q.shape[:-1], words_of(keys) + words_of(shared_keys))
    task = loader.Attention(
        *map(_pointer, given), _pointer(limit), out.data_ptr(), batch * heads, heads, blocks, n, keys, shared_keys, words, inputs,
        0 if p is None else p.size(-1), start, window, by_query,
    )  # fmt: skip
    if out.numel():
        kernel.library.hubert_eff_attention(kernel.functions, ctypes.byref(task), torch.get_num_threads())
    return out


def _attention_shape(
    q: Tensor,
    k: Tensor,
    keys: int,
    inputs: int,
    cost: Tensor,
    threshold: Tensor,
    seen: Tensor | None = None,
    start: int = 0,
    window: int = -1,
) -> Tensor:
    return q.new_empty(*q.shape[:-1], words_of(keys))


@_operation(
    "attention(Tensor q, Tensor k, SymInt keys, SymInt inputs, Tensor cost, Tensor threshold, Tensor? seen=None, SymInt start=0, "
    "SymInt window=-1) -> Tensor",
    _attention_shape,
)
def attention(
    q: Tensor,
    k: Tensor,
    keys: int,
    inputs: int,
    cost: Tensor,
    threshold: Tensor,
    seen: Tensor | None = None,
    start: int = 0,
    window: int = -1,
) -> Tensor:
    """Bits of the keys that each query attends to: q (B, H, n, W), k (B, H, ceil(T / 16), W, 16) -> (B, H, n, ceil(T / 32)).

    Its `product` with values packed along time is, up to a scale, the result of the attention. cost (1,): the cost of a differing bit
    (quant/integer_softmax.py). threshold (1,): what visible * P must exceed. seen (B, ceil(T / 32)): bits of the visible keys, None for
    all; (B, n, ceil(T / 32)): those of each query. window: query i sees the keys start + i - window ... start + i + window.
    """
    if kernel := _native(q, inputs):
        return _attend(kernel, q, k, None, None, None, keys, 0, inputs, cost, threshold, seen, None, start, window)
    visible = _seen(seen, keys)
    parts = []
    for first in range(0, q.size(2), QUERIES):
        rows = q[:, :, first : first + QUERIES]
        sees = visible if visible is None or visible.size(2) == 1 else visible[:, :, first : first + QUERIES]
        if window >= 0:
            place = torch.arange(start + first, start + first + rows.size(2), device=q.device).unsqueeze(1)
            near = (place - torch.arange(keys, device=q.device)).abs() <= window
            sees = near if visible is None else near & visible
        parts.append(_attended(_distances(rows, k, keys, inputs).mul_(cost), sees, threshold))
    return torch.cat(parts, 2)


def _relative_shape(
    q: Tensor, p: Tensor, k: Tensor, offsets: Tensor, keys: int, inputs: int, positions: int, cost: Tensor, threshold: Tensor,
    seen: Tensor | None = None, start: int = 0,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:-1], words_of(keys))


@_operation(
    "relative_attention(Tensor q, Tensor p, Tensor k, Tensor offsets, SymInt keys, SymInt inputs, SymInt positions, Tensor cost, "
    "Tensor threshold, Tensor? seen=None, SymInt start=0) -> Tensor",
    _relative_shape,
)
def relative_attention(
    q: Tensor, p: Tensor, k: Tensor, offsets: Tensor, keys: int, inputs: int, positions: int, cost: Tensor, threshold: Tensor,
    seen: Tensor | None = None, start: int = 0,
) -> Tensor:  # fmt: skip
    """`attention` with relative positions: p (B, H, n, E) of `positions` inputs, offsets (H, ceil((2T - 1) / 16), E, 16), cost (2,).

    Query i is at the place of key start + i; its offset from key j is row T - 1 - start - i + j.
    """
    if kernel := _native(q, inputs, positions):
        return _attend(kernel, q, k, None, p, offsets, keys, 0, inputs, cost, threshold, seen, None, start, -1)
    visible = _seen(seen, keys)
    parts = []
    for first in range(0, q.size(2), QUERIES):
        rows = slice(first, first + QUERIES)
        places = _distances(p[:, :, rows], offsets.expand(q.size(0), *offsets.shape), 2 * keys - 1, positions)
        costs = _by_key(places, keys, start + first).mul_(cost[1:])
        sees = visible if visible is None or visible.size(2) == 1 else visible[:, :, rows]
        parts.append(_attended(costs.add_(_distances(q[:, :, rows], k, keys, inputs).mul_(cost[:1])), sees, threshold))
    return torch.cat(parts, 2)


def _blocked_shape(
    q: Tensor, k: Tensor, shared: Tensor, keys: int, shared_keys: int, inputs: int, cost: Tensor, threshold: Tensor,
    seen: Tensor | None = None, shared_seen: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:-1], words_of(keys) + words_of(shared_keys))


@_operation(
    "blocked_attention(Tensor q, Tensor k, Tensor shared, SymInt keys, SymInt shared_keys, SymInt inputs, Tensor cost, Tensor threshold, "
    "Tensor? seen=None, Tensor? shared_seen=None) -> Tensor",
    _blocked_shape,
)
def blocked_attention(
    q: Tensor, k: Tensor, shared: Tensor, keys: int, shared_keys: int, inputs: int, cost: Tensor, threshold: Tensor,
    seen: Tensor | None = None, shared_seen: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`attention` of blocks (B, H, N, L, W) to their own keys (B, H, N, ceil(T / 16), W, 16) and to those all share, (B, H, .., W, 16).

    One sum runs over both. Bits (B, H, N, L, ceil(T / 32) + ceil(G / 32)): those of the own keys and, from a new word on, of the shared
    keys. seen (B, N, ceil(T / 32)), shared_seen (B, ceil(G / 32)).
    """
    if kernel := _native(q, inputs):
        return _attend(kernel, q, k, shared, None, None, keys, shared_keys, inputs, cost, threshold, seen, shared_seen, 0, -1)
    own = _distances(q, k, keys, inputs)
    far = _distances(q, shared.unsqueeze(2), shared_keys, inputs).expand(*own.shape[:-1], -1)
    sees = None
    if seen is not None or shared_seen is not None:
        of_own = own.new_ones(1, 1, keys) if seen is None else bits_from(seen, keys)  # (B, N, T)
        of_far = own.new_ones(1, shared_keys) if shared_seen is None else bits_from(shared_seen, shared_keys)  # (B, G)
        lead = (q.size(0), 1, q.size(2), 1)
        sees = torch.cat((of_own[:, None, :, None].bool().expand(*lead, -1), of_far[:, None, None, None].bool().expand(*lead, -1)), -1)
    bits = bits_from(_attended(torch.cat((own, far), -1).mul_(cost), sees, threshold), keys + shared_keys)
    return torch.cat((words_from(bits[..., :keys]), words_from(bits[..., keys:])), -1)
