"""Stores packed models in a file: one bit per weight in the order of the float weight, independent of the kernels' order, with the
learnable biases of queries, keys and values folded into the layers before them.
"""

# N outputs, K inputs, k kernel, G groups

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers.kinds import kinds_of
from .runtime import ops
from .runtime.int8 import Int8Linear
from .runtime.modules import PackedConv1d, PackedLinear, PackedQuantizer, constant

SCALES = "quantizer_scales"  # in a file, the scales of all quantizers in the model's order: one tensor instead of hundreds of one number
WIDE_TYPES = (PackedLinear, PackedConv1d, PackedQuantizer, Int8Linear)  # modules whose float tensors are always float32


def is_packed(model: nn.Module) -> bool:
    """Whether a model runs from packed bits."""
    return any(isinstance(module, (PackedLinear, PackedConv1d)) for module in model.modules())


# -- moves ------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_moves(packed: nn.Module) -> None:
    """Fold the learnable biases (moves) of quantizers that read a packed layer's output into that layer's bias, without changing any bit.

    Modules declare them (`Kind.sources`). The new bias is the sum of both if that gives the same bits; if rounding would change bits, it is
    the bias for which the last sum without a bit gives zero.
    """
    for owner in packed.modules():
        kinds = kinds_of(owner)
        for name, kind in kinds.items():
            product = getattr(owner, name)
            for operand, (source, first) in kind.sources.items():
                layer, quantizer = getattr(owner, source), getattr(product, operand, None)
                if isinstance(layer, PackedLinear) and isinstance(quantizer, PackedQuantizer) and quantizer.move is not None:
                    read = layer.input if layer.input is not None else getattr(owner, kinds[source].shared)
                    _fold(layer, read.scale, quantizer, first)


def _fold(layer: PackedLinear, scale: Tensor, quantizer: PackedQuantizer, first: int) -> None:
    assert quantizer.move is not None and quantizer.signed
    move = quantizer.move.float().flatten()
    part = slice(first, first + move.numel())
    bias = move.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach().float().clone()
    if not bias.is_meta:  # otherwise only the structure is wanted
        factor = (scale.float() * layer.size.float()).expand(layer.out_features)[part]
        bias[part] = exact_bias(factor, bias[part], move, layer.in_features)
    layer.bias = constant(bias)
    quantizer.move = None


def exact_bias(factor: Tensor, bias: Tensor, move: Tensor, inputs: int) -> Tensor:
    """A bias (N,): sum * factor + new > 0 where (sum * factor + bias) + move > 0, in float32, for all whole sums up to `inputs`."""
    low = torch.full_like(factor, -inputs - 1)  # no bit
    high = torch.full_like(factor, inputs)  # the last sum without a bit is at most this

    def bits(sums: Tensor) -> Tensor:
        return (sums * factor + bias) + move > 0

    while bool((low < high).any()):  # results grow with the sum
        middle = ((low + high + 1) / 2).floor()
        without = ~bits(middle)
        low, high = torch.where(without, middle, low), torch.where(without, high, middle - 1)
    new = bias + move
    same = ((low * factor + new <= 0) | (low < -inputs)) & (((low + 1) * factor + new > 0) | (low >= inputs))
    return torch.where(same, new, -(low * factor))


# -- bits -------------------------------------------------------------------------------------------------------------------------------


def bytes_of(layer: PackedLinear | PackedConv1d) -> Tensor:
    """The bits of a layer's weight (N, K), or (N, K / G, k), row by row, eight to a byte, the first one lowest: uint8 (ceil(N K / 8),)."""
    bits = layer.bits
    if isinstance(layer, PackedLinear):
        positive = ops.bits_from(ops.rows_from(bits, layer.out_features), layer.in_features)
    elif layer.depthwise:
        positive = ops.bits_from(ops.rows_from(bits, layer.out_channels), layer.kernel)
    else:
        rows = ops.rows_from(bits, layer.out_channels // layer.groups)  # (G, N / G, k W)
        by_tap = torch.unflatten(rows, -1, (layer.kernel, -1))
        positive = ops.bits_from(by_tap, layer.in_channels // layer.groups).transpose(-1, -2)
    flat = positive.flatten()
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8).to(torch.uint8)
    return (flat << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def bits_of(stored: Tensor, layer: PackedLinear | PackedConv1d) -> Tensor:
    """The inverse of `bytes_of`: panels in the order of the kernels, for a layer of this shape."""
    elements, _ = layer.stored_bits["bits"]
    if isinstance(layer, PackedLinear) and layer.in_features % ops.WORD == 0 and sys.byteorder == "little":  # rows are whole words
        return ops.panels_from(stored.clone().view(torch.int32).view(layer.out_features, -1))  # a copy begins where words may
    positive = (stored.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()[:elements]
    if isinstance(layer, PackedLinear):
        words = ops.words_from(positive.view(layer.out_features, layer.in_features))
    elif layer.depthwise:
        words = ops.words_from(positive.view(layer.out_channels, layer.kernel))
    else:
        weight = positive.view(layer.out_channels, -1, layer.kernel)
        words = torch.unflatten(ops.words_from(weight.transpose(1, 2)).flatten(1), 0, (layer.groups, -1))
    return ops.panels_from(words)


# -- a model's tensors ------------------------------------------------------------------------------------------------------------------

Stored = tuple[torch.dtype, tuple[int, ...]]


def layout(model: nn.Module, rest: torch.dtype, leave_out: str) -> dict[str, Stored]:
    """Name -> (dtype, shape) of the tensors in a file of a float or packed model with float tensors as `rest`.

    Scales and biases of packed and int8 layers are always float32. The model may be on the meta device.
    """
    found: dict[str, Stored] = {}
    scales, modules = 0, dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        path, _, own = name.rpartition(".")
        owner = modules.get(path)
        if name == leave_out or not isinstance(tensor, Tensor):
            continue
        if isinstance(owner, PackedQuantizer) and own in ("scale", "initialized"):
            scales += own == "scale"
        elif isinstance(owner, (PackedLinear, PackedConv1d)) and own == "bits":
            found[name] = torch.uint8, (math.ceil(owner.stored_bits["bits"][0] / 8),)
        else:
            dtype = torch.float32 if isinstance(owner, WIDE_TYPES) else rest
            found[name] = dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape)
    if scales:
        found[SCALES] = torch.float32, (scales,)
    return found


@torch.no_grad()
def tensors(model: nn.Module, rest: torch.dtype, leave_out: str) -> dict[str, Tensor]:
    """The tensors that `layout` describes. Raises `UserError` if a number is not finite or does not fit into `rest`."""
    modules, state = dict(model.named_modules()), model.state_dict()
    scales = [t.flatten() for name, t in state.items() if name.endswith(".scale") and _is_quantizer(modules, name)]
    found = {}
    for name, (dtype, _) in layout(model, rest, leave_out).items():
        path, _, own = name.rpartition(".")
        owner = modules.get(path)
        if name == SCALES:
            tensor = torch.cat(scales)
        elif isinstance(owner, (PackedLinear, PackedConv1d)) and own == "bits":
            tensor = bytes_of(owner.cpu())
        else:
            tensor = state[name]
        if not bool(tensor.isfinite().all()):
            raise UserError(f"cannot export: {name} holds numbers that are not finite")
        kept = tensor.detach().cpu().to(dtype).contiguous()
        if not bool(kept.isfinite().all()):
            raise UserError(f"cannot export as {dtype}: {name} has values up to {tensor.abs().max():.3g}; take bf16 or fp32")
        found[name] = kept
    return found


def _is_quantizer(modules: dict[str, nn.Module], name: str) -> bool:
    return isinstance(modules.get(name.rpartition(".")[0]), PackedQuantizer)


def state_from(stored: dict[str, Tensor], structure: nn.Module, compute: torch.dtype) -> dict[str, Any]:
    """The state of a model from the tensors of a file, which fit its `layout`. `compute`: dtype of the float rest."""
    modules, state, place = dict(structure.named_modules()), {}, 0
    for name in structure.state_dict():
        path, _, own = name.rpartition(".")
        owner = modules.get(path)
        if isinstance(owner, PackedQuantizer) and own == "initialized":
            state[name] = torch.tensor(True)
        elif isinstance(owner, PackedQuantizer) and own == "scale":
            state[name] = stored[SCALES][place : place + 1].clone()
            place += 1
        elif isinstance(owner, (PackedLinear, PackedConv1d)) and own == "bits":
            state[name] = bits_of(stored[name], owner)
        else:
            tensor = stored[name]
            state[name] = tensor.to(compute) if tensor.is_floating_point() and not isinstance(owner, WIDE_TYPES) else tensor
    return state
