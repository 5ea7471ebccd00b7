"""Layers that run on packed bits, with exactly the results of the binary layers that they are made from. They cannot be trained.

They store one bit per weight, in panels of 16 outputs (ops.py), and everything else as the binary layer: scales of the weights, biases,
and scales and learnable biases of quantizers.
"""

# B batch, T frames, K inputs, N outputs, G groups, k kernel, W words of 32 bits

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UserError
from ...layers.bits import Cost, counted_as
from ...layers.chunks import Chunks
from ...layers.convolution import reach
from ...layers.precision import wide
from ...layers.tracing import follows_shapes
from ..functional import FLOOR, weight_signs
from ..modules import BinaryConv1d, BinaryLinear, FrameMask, Quantizer
from . import ops

M = TypeVar("M", bound=nn.Module)


class PackedCodes(NamedTuple):
    """A quantized tensor, scale times bits: the counterpart of `Codes` in binary layers."""

    bits: Tensor  # (..., W), int32
    scale: Tensor  # (1,)
    inputs: int
    signed: bool
    half: bool  # whether the tensor was bfloat16, and so the result of a product is

    def part(self, bits: Tensor) -> PackedCodes:
        """Some rows of the same tensor."""
        return PackedCodes(bits, self.scale, self.inputs, self.signed, self.half)

    def heads(self, count: int) -> PackedCodes:
        """Split bits (B, T, W) of heads side by side, each of whole words, into (B, H, T, W / H)."""
        bits = torch.unflatten(self.bits, -1, (count, -1)).transpose(1, 2)
        return PackedCodes(bits, self.scale, self.inputs // count, self.signed, self.half)


def constant(value: Tensor) -> nn.Parameter:
    """A parameter that does not train."""
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def _one_bit(bits: int) -> None:
    if bits != 1:
        raise UserError(f"activations of {bits} bits cannot be packed: only w1a1 models run from bits")


class PackedQuantizer(nn.Module):
    """x -> `PackedCodes` of x + move."""

    def __init__(self, source: Quantizer) -> None:
        super().__init__()
        _one_bit(source.bits)
        self.signed = source.signed
        self.scale = constant(wide(source.scale).clamp(min=FLOOR))
        self.move = None if source.move is None else constant(source.move)
        self.initialized: Tensor
        self.register_buffer("initialized", source.initialized.clone())
        self.frames: FrameMask = source.frames

    def extra_repr(self) -> str:
        return f"bits=1, {'signed' if self.signed else 'unsigned'}, move={self.move is not None}"

    @property
    def limit(self) -> Tensor | None:
        """The limit above which a number becomes a bit of 1; None for zero."""
        return None if self.signed else self.scale / 2

    def forward(self, x: Tensor) -> PackedCodes:
        """x (..., K)."""
        return PackedCodes(ops.pack(x, self.move, None, self.limit), self.scale, x.size(-1), self.signed, x.dtype == torch.bfloat16)

    def columns(self, x: Tensor, before: int = 0, after: int = 0) -> Tensor:
        """Bits of x (..., T, C) along its frames, as panels, with a number of 0 bits before and after them."""
        return ops.pack_columns(x, self.move, self.limit, before, after)


def _stored(bits: Tensor, weights: int, size: Tensor) -> dict[str, tuple[int, float]]:
    """The same as `quant.modules._stored` for this weight."""
    return {"bits": (weights, 1 + 32 * size.numel() / weights), "size": (0, 32)}


class PackedLinear(nn.Module):
    """`BinaryLinear` from bits: y = (a m) (bits(x) . bits(W)) + bias; x (..., K), or `PackedCodes`, -> (..., N)."""

    operand_bits = (1, 1)

    def __init__(self, source: BinaryLinear) -> None:
        super().__init__()
        _one_bit(source.operand_bits[1])
        self.out_features, self.in_features = source.weight.shape
        signs, size = weight_signs(source.weight, source.per_channel)
        self.bits = constant(ops.panels_from(ops.words_from(signs > 0)))
        self.size = constant(size)
        self.bias = None if source.bias is None else constant(source.bias)
        self.stored_bits = _stored(self.bits, source.weight.numel(), self.size)
        self.input = None if source.input is None else PackedQuantizer(source.input)
        self._reader: tuple[PackedQuantizer, ...] = ()  # a tuple hides it from nn.Module, since another module owns it
        self._limits: tuple[tuple[object, ...], Tensor] | None = None

    @classmethod
    def from_binary(cls, source: BinaryLinear) -> PackedLinear:
        """Raises `UserError` for activations of more than one bit."""
        return cls(source)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def feed(self, reader: PackedQuantizer) -> None:
        """From now on return the codes that `reader` makes of y, or of max(y, 0) if it is unsigned, without storing y."""
        self._reader = (reader,)

    def forward(self, input: Tensor | PackedCodes) -> Tensor | PackedCodes:
        if isinstance(input, Tensor):
            assert self.input is not None
            input = self.input(input)
        bits, scale, inputs, signed, half = input
        if not self._reader:
            return ops.product(bits, self.bits, self.out_features, inputs, signed, scale, self.size, self.bias, half)
        (reader,) = self._reader
        if torch.compiler.is_compiling():  # a compiler cannot follow the search for the limits; the bits are the same
            y = ops.product(bits, self.bits, self.out_features, inputs, signed, scale, self.size, self.bias)
            move = None if reader.move is None else reader.move.flatten()
            words = ops.pack(y if reader.signed else y.relu(), move, None, reader.limit)
        else:
            words = ops.product_bits(bits, self.bits, self.out_features, inputs, self._limit(reader, scale))
        return PackedCodes(words, reader.scale, self.out_features, reader.signed, half)

    @counted_as("copy", lambda *_: Cost(0, 0))  # once for a model, not for each input
    @torch.no_grad()
    def _limit(self, reader: PackedQuantizer, scale: Tensor) -> Tensor:
        """For each output, how many of the K bits may differ for a bit of 1, found by the arithmetic of y itself."""
        if follows_shapes(scale):
            return torch.empty(self.out_features, dtype=torch.int32, device=scale.device)
        sources = [scale, self.size, self.bias, reader.scale, reader.move]
        key = tuple(None if t is None else (id(t), 0 if t.is_inference() else t._version, t.dtype, t.device) for t in sources)
        if self._limits is not None and self._limits[0] == key:
            return self._limits[1]
        factor = (scale.float() * self.size.float()).expand(self.out_features)
        most = 0.0 if reader.limit is None else reader.limit.float()
        move = None if reader.move is None else reader.move.float().flatten()

        def passes(differing: Tensor) -> Tensor:
            y = (self.in_features - 2 * differing).float() * factor
            y = y if self.bias is None else y + self.bias.float()
            y = y if reader.signed else y.relu()
            passed: Tensor = (y if move is None else y + move) > most
            return passed

        low = torch.full((self.out_features,), -1, dtype=torch.int32, device=self.size.device)  # the limit is at least this
        high = torch.full_like(low, self.in_features)
        while bool((low < high).any()):
            middle = (low + high + 1).div(2, rounding_mode="floor")
            good = passes(middle)
            low, high = torch.where(good, middle, low), torch.where(good, high, middle - 1)
        self._limits = (key, low)
        return low


class PackedConv1d(nn.Module):
    """`BinaryConv1d` from bits: (B, T, K) -> (B, ceil(T / stride), N); along time if depthwise, otherwise as a product of windows."""

    operand_bits = (1, 1)

    def __init__(self, source: BinaryConv1d) -> None:
        super().__init__()
        self.stride, self.groups, self.causal = source.stride, source.groups, source.causal
        self.out_channels, width, self.kernel = source.weight.shape
        self.in_channels = width * self.groups
        self.depthwise = width == 1 and self.out_channels == self.groups
        signs, size = weight_signs(source.weight, source.per_channel, self.groups)  # (N, K / G, k)
        positive = signs > 0
        if self.depthwise:
            words = ops.words_from(positive.squeeze(1))  # (N, W)
        else:
            words = torch.unflatten(ops.words_from(positive.transpose(1, 2)).flatten(1), 0, (self.groups, -1))  # (G, N / G, k W)
        self.bits = constant(ops.panels_from(words))
        self.size = constant(size)
        self.bias = None if source.bias is None else constant(source.bias)
        self.stored_bits = _stored(self.bits, source.weight.numel(), self.size)
        self.input = PackedQuantizer(source.input)

    @classmethod
    def from_binary(cls, source: BinaryConv1d) -> PackedConv1d:
        """Raises `UserError` for activations of more than one bit."""
        return cls(source)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel={self.kernel}, stride={self.stride}, groups={self.groups}"

    def forward(self, x: Tensor, chunks: Chunks | None = None) -> Tensor:
        """Convolve; `chunks` as in `BinaryConv1d`. Only depthwise convolutions run in chunks."""
        batch, frames = x.shape[:2]
        before, after = reach(self.kernel, self.stride, self.causal, frames)
        mask = self.input.frames.over(x)  # (B, T, 1)
        half = x.dtype == torch.bfloat16
        if self.depthwise and chunks is None and mask is None:
            out = (before + frames + after - self.kernel) // self.stride + 1
            return ops.depthwise(
                self.input.columns(x, before, after), None, self.bits, self.out_channels, self.kernel, self.stride, out, self.input.signed,
                self.input.scale, self.size, self.bias, half, before, before + frames,
            )  # fmt: skip
        valid = x.new_ones(batch, frames, 1, dtype=torch.float32) if mask is None else mask.float()
        if self.depthwise:
            if chunks is None:
                bits, valid = self.input.columns(x, before, after), F.pad(valid, (0, 0, before, after))
            elif chunks.kept is None:
                bits, valid = (chunks.windows(self, part, before, after) for part in (x, valid))
                bits = self.input.columns(bits)
            else:
                bits = self._streamed(x, before, after, chunks)
                real = min(chunks.start, before)  # nothing precedes the first frame
                valid = F.pad(F.pad(valid, (0, 0, real, 0), value=1.0), (0, 0, before - real, after))
            out = (valid.size(1) - self.kernel) // self.stride + 1
            y = ops.depthwise(
                bits, ops.pack(valid.squeeze(-1)), self.bits, self.out_channels, self.kernel, self.stride, out, self.input.signed,
                self.input.scale, self.size, self.bias, half,
            )  # fmt: skip
            return y if chunks is None else chunks.joined(y, batch, -(-frames // self.stride))
        y = self._windows(x, mask, F.pad(valid.squeeze(-1), (before, after)), before, after)
        y = y * (self.input.scale.float() * self.size.float())
        y = y if self.bias is None else y + self.bias.float()
        return y.bfloat16() if half else y

    def _streamed(self, x: Tensor, before: int, after: int, chunks: Chunks) -> Tensor:
        """Panels of a stream's x (B, T, K), `before` frames before it and `after` zeros after it; the stream keeps all but the zeros."""
        assert chunks.kept is not None
        frames = before + x.size(1)
        if self in chunks.kept:
            (kept,), surplus = chunks.kept[self], chunks.size
        else:
            kept, surplus = x.new_zeros(x.size(0), ops.panels_of(self.in_channels), ops.words_of(before), ops.LANES, dtype=torch.int32), 0
        panels = ops.join_columns(kept, before + surplus, surplus, self.input.columns(x), x.size(1))
        chunks.kept[self] = (panels,)
        return F.pad(panels, (0, 0, 0, ops.words_of(frames + after) - panels.size(-2)))

    def _windows(self, x: Tensor, mask: Tensor | None, valid: Tensor, before: int, after: int) -> Tensor:
        """Sums (B, T', N). Padding has bits of 0, which mean 0 in unsigned input and -1 in signed input; the latter is corrected here."""
        batch, width, outputs = x.size(0), self.in_channels // self.groups, self.out_channels // self.groups
        move = self.input.move
        moved = x if move is None else x + move
        bits = ops.pack(torch.unflatten(moved, -1, (self.groups, width)).transpose(1, 2), None, None, self.input.limit)  # (B, G, T, W)
        if mask is not None:
            bits = bits.masked_fill(~mask.unsqueeze(1), 0)
        windows = F.pad(bits, (0, 0, before, after)).unfold(2, self.kernel, self.stride)  # (B, G, T', W, k)
        rows = windows.transpose(-1, -2).flatten(3)
        panels = self.bits.expand(batch, *self.bits.shape)
        y = ops.product(rows, panels, outputs, width * self.kernel, self.input.signed).transpose(1, 2).flatten(2)  # (B, T', N)
        if not self.input.signed:
            return y
        by_tap = torch.unflatten(ops.rows_from(self.bits, outputs), -1, (self.kernel, -1))  # (G, N / G, k, W)
        of_tap = 2 * ops.bits_from(by_tap, width).sum(-1).flatten(0, 1).float() - width  # sums of signs, (N, k)
        missing: Tensor = (1 - valid).unfold(1, self.kernel, self.stride) @ of_tap.T
        return y + missing
