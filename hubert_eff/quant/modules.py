"""Layers that train at one bit: the signs of a float `weight` multiply the codes of the input, as sums of integers in float.

`PackedLinear` and the like compute the same from bits with the same interface; nothing else in a model knows which of them it holds.
"""

# B batch, T frames, K inputs, N outputs, k kernel

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from ..errors import UserError
from ..layers.chunks import Chunks
from ..layers.convolution import convolve, reach
from ..layers.linear import linear
from .functional import FLOOR, effective_scale, initial_scale, scaled, signed_codes, signed_range, unsigned_codes, weight_signs


class Codes(NamedTuple):
    """A quantized tensor scale * values, where values are integers (if unsigned with more than one bit, integers plus a common offset)."""

    values: Tensor
    scale: Tensor  # (1,), float32 at least


class FrameMask:
    """The frames of the current batch that are not padding; hooks of a block tell all quantizers in it.

    So a layer of the float model and its replacement are called in the same way, with their input alone.
    """

    valid: Tensor | None = None  # (B, T) bool; None: all

    def enter(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a block, which is called as block(x, frames)."""
        self.valid = args[1].valid

    def leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook."""
        self.valid = None

    def over(self, x: Tensor) -> Tensor | None:
        """The mask in a shape that broadcasts to x (B, T, C) or (B, H, T, d)."""
        if self.valid is None:
            return None
        return self.valid.unsqueeze(-1) if x.dim() == 3 else self.valid[:, None, :, None]


# what a monitor gets for a quantized tensor: x with its learnable bias, codes, scale, minimum, mask
Watch = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None"], None]


class Quantizer(nn.Module):
    """x -> `Codes` of x + move, with one learned scale.

    The first batch in train mode sets the scale, without padding and over all data-parallel processes; until then, and if that batch is all
    zeros, the scale is 1.
    `initial`: a known start value. move: the shape of the learnable bias per channel that BiT calls a move; None for no bias.
    At two bits an unsigned tensor is quantized from the minimum of each sequence on, or in a model that streams, which does not know it,
    from 0 (`from_zero`), the minimum of a ReLU.
    """

    from_zero = False

    def __init__(self, bits: int, signed: bool, move: tuple[int, ...] | None = None, initial: float | None = None) -> None:
        super().__init__()
        self.bits, self.signed = bits, signed
        self.levels = signed_range(bits)[1] if signed else 2**bits - 1
        self.scale = nn.Parameter(torch.ones(1) if initial is None else torch.full((1,), float(initial)))
        self.move = None if move is None else nn.Parameter(torch.zeros(move))
        self.initialized: Tensor
        self.register_buffer("initialized", torch.tensor(initial is not None))
        self._ready = initial is not None  # the value of `initialized`, without waiting for a GPU
        self.frames = FrameMask()
        self.watch: Watch | None = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._ready = not self.initialized.is_meta and bool(self.initialized)  # meta: only names and shapes are compared

    def extra_repr(self) -> str:
        return f"bits={self.bits}, {'signed' if self.signed else 'unsigned'}, move={self.move is not None}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's parameters."""
        return self.scale.dtype

    def effective(self, count: Tensor | int) -> Tensor:
        """The scale for a tensor of `count` elements that are not padding."""
        return effective_scale(self.scale, count, self.levels)

    def forward(self, x: Tensor) -> Codes:
        """x (B, T, C) or (B, H, T, d)."""
        return self.masked(x, self.frames.over(x))

    def masked(self, x: Tensor, mask: Tensor | None) -> Codes:
        """Quantize with a given mask: bool, broadcastable to x and with as many dimensions; False = padding."""
        if self.move is not None:
            x = x + self.move
        if self.training and not self._ready:
            self._initialize(x.detach(), mask)
        count = x.numel() if mask is None else mask.sum() * (x.numel() // mask.numel())
        scale = self.effective(count)
        offset = None
        if not self.signed and self.bits > 1:  # the minimum of each sequence
            seen = x.detach() if mask is None else x.detach().masked_fill(~mask, torch.inf)
            offset = seen.amin(tuple(range(1, x.dim())), keepdim=True)
            offset = offset.masked_fill((offset == torch.inf) | self.from_zero, 0.0)  # inf: a sequence of padding only
        codes = signed_codes(x, scale, self.bits) if self.signed else unsigned_codes(x, scale, self.bits, offset)
        if self.watch is not None:
            self.watch(x, codes, scale, offset, mask)
        return Codes(codes, scale)

    @torch.no_grad()
    def _initialize(self, x: Tensor, mask: Tensor | None) -> None:
        size = x.float().abs()
        if mask is None:
            total = torch.stack((size.sum(), size.new_tensor(float(x.numel()))))
        else:
            total = torch.stack((size.masked_fill(~mask, 0.0).sum(), mask.sum().float() * (x.numel() // mask.numel())))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        start = torch.as_tensor(initial_scale(total[0] / total[1].clamp(min=1.0), self.signed, self.levels))
        start = torch.where(total[0] > 0, start.clamp(min=FLOOR), 1.0)  # at the floor, all input of a layer of zeros would be saturated
        self.scale.copy_(start)
        self.initialized.fill_(True)
        self._ready = True


def unstarted(model: nn.Module) -> str:
    """A message about scales that no batch has set and that are therefore meaningless; "" if there are none."""
    scales = {name: m.initialized for name, m in model.named_modules() if isinstance(m, Quantizer) and not m.initialized.is_meta}
    found = [name for name, started in scales.items() if not started]
    if not found:
        return ""
    return (
        f"{len(found)} of {len(scales)} scales never saw data (the first: {found[0] or 'its own'}); train the model, or run a batch of "
        "speech through it in train mode"
    )


def _stored(weight: Tensor, per_channel: bool) -> dict[str, tuple[int, float]]:
    """One bit per weight, and the weight scales as float32."""
    return {"weight": (weight.numel(), 1 + 32 * (weight.size(0) if per_channel else 1) / weight.numel())}


class BinaryLinear(nn.Linear):
    """y = (a m) (codes(x) . signs(W)) + bias; x (..., K) -> (..., N).

    bits: width of the input. signed: whether the input takes both signs. per_channel: one weight scale m per output instead of one in all.
    move: a learnable bias before the input's quantizer. own_input: False if a quantizer that several layers share gives it `Codes`.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, bits: int = 1, signed: bool = True, per_channel: bool = True,
        move: bool = True, own_input: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias)
        self.per_channel = per_channel
        self.operand_bits = (1, bits)
        self.stored_bits = _stored(self.weight, per_channel)
        self.input = Quantizer(bits, signed, (in_features,) if move else None) if own_input else None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, operand_bits={self.operand_bits}, per_channel={self.per_channel}"

    def forward(self, input: Tensor | Codes) -> Tensor:
        if isinstance(input, Tensor):
            assert self.input is not None
            codes: Codes = self.input(input)
        else:
            codes = input
        signs, size = weight_signs(self.weight, self.per_channel)
        y = scaled(linear(codes.values, signs), codes.scale * size, self.weight.dtype)
        return y if self.bias is None else y + self.bias


class BinaryConv1d(nn.Module):
    """The same for a convolution over time with zero padding, (B, T, K) -> (B, ceil(T / stride), N); weight (N, K / groups, k).

    At stride 1 the kernel, which is odd, is centered, or ends at its frame if `causal`; at larger strides it begins there. Padded frames
    and the padding at the ends are 0, neither of the two values of a bit, and add nothing to a sum.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, bias: bool = True, *, stride: int = 1, groups: int = 1, bits: int = 1,
        signed: bool = True, per_channel: bool = True, move: bool = True, causal: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise UserError(f"groups={groups} must divide the channels, {in_channels} and {out_channels}")
        if stride == 1 and kernel % 2 == 0:
            raise UserError(f"kernel={kernel} must be odd at stride 1")
        self.stride, self.groups, self.per_channel, self.causal = stride, groups, per_channel, causal
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.operand_bits = (1, bits)
        self.stored_bits = _stored(self.weight, per_channel)
        self.input = Quantizer(bits, signed, (in_channels,) if move else None)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, stride={self.stride}, groups={self.groups}, operand_bits={self.operand_bits}"

    def forward(self, x: Tensor, chunks: Chunks | None = None) -> Tensor:
        """Convolve; with `chunks`, a frame sees zeros beyond the end of its chunk."""
        codes: Codes = self.input(x)
        values, scale = codes
        mask = self.input.frames.over(x)
        if mask is not None:
            values = values.masked_fill(~mask, 0.0)
        signs, size = weight_signs(self.weight, self.per_channel, self.groups)
        kernel = signs.size(2)
        before, after = reach(kernel, self.stride, self.causal, x.size(1))
        if kernel == self.stride == self.groups == 1:
            y = linear(values, signs.squeeze(2))
        elif chunks is not None:
            y = convolve(chunks.windows(self, values, before, after), signs, None, self.stride, 0, self.groups)
            y = chunks.joined(y, x.size(0), -(-x.size(1) // self.stride))
        else:
            y = convolve(F.pad(values, (0, 0, before, after)), signs, None, self.stride, 0, self.groups)
        y = scaled(y, scale * size, self.weight.dtype)
        return y if self.bias is None else y + self.bias
