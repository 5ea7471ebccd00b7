"""`pack` turns a binarized model into one that runs from bits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import UserError
from ..layers.attention import SelfAttention
from ..layers.kinds import FEED_FORWARD, kinds_of
from ..layers.position import PositionalConv1d
from .attention import BinaryAttention, BinaryMix, BinaryRelativeAttention, BinarySparseAttention, BinaryWeights
from .modules import BinaryConv1d, BinaryLinear, Quantizer, unstarted
from .runtime.attention import PackedAttention, PackedMix, PackedRelativeAttention, PackedSparseAttention, PackedWeights
from .runtime.modules import PackedConv1d, PackedLinear, PackedQuantizer
from .runtime.ops import WORD

M = TypeVar("M", bound=nn.Module)

PACKED: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    BinaryLinear: PackedLinear.from_binary,
    BinaryConv1d: PackedConv1d.from_binary,
    Quantizer: PackedQuantizer,  # a quantizer that several layers share
    BinaryAttention: PackedAttention,
    BinaryRelativeAttention: PackedRelativeAttention,
    BinarySparseAttention: PackedSparseAttention,
    BinaryWeights: PackedWeights,
    BinaryMix: PackedMix,
}


REST = (torch.float32, torch.bfloat16)


def pack(model: M, fused: bool = True, rest: torch.dtype = torch.float32) -> M:
    """Make a copy of a w1a1 model that runs from packed bits (XNOR and popcount) and gives the same outputs.

    The source is not changed; the copy cannot be trained. It warns of scales that never saw data.

    Args:
        model: a binarized model, or a part of one.
        fused: let a packed layer return bits where only a quantizer reads its output (a ReLU and the next feed-forward layer, or the
            products of attention). This changes no bit.
        rest: the dtype of the outputs and of everything that is not binary, such as the extractor and the norms: float32, where outputs
            are equal to the last bit, or bfloat16. Scales and biases of binary layers stay float32.

    Returns:
        The copy, in eval mode.

    Raises:
        UserError: the model has no binary layers or has activations of more than one bit, or the dtype is another one.
    """
    if said := unstarted(model):
        warnings.warn(said, stacklevel=2)
    return packed_copy(model, fused, rest)


def packed_copy(model: M, fused: bool = True, rest: torch.dtype = torch.float32) -> M:
    """Do what `pack` does for a model whose scales may not have seen data yet."""
    return packed_in_place(copy.deepcopy(model), fused, rest)


def packed_in_place(model: M, fused: bool = True, rest: torch.dtype = torch.float32) -> M:
    """Do what `packed_copy` does, and consume the model."""
    if rest not in REST:
        raise UserError(f"rest={rest}: what is not binary computes in one of {', '.join(map(str, REST))}")
    if not any(type(module) in PACKED for module in model.modules()):
        raise UserError("this model has no one-bit layers to pack: hubert_eff.binarize it, and train it, first")
    packed = model.eval()
    with torch.no_grad():
        packed = _convert(packed)  # type: ignore[assignment]
        convert_rest(packed, rest)
    if fused:
        for module in packed.modules():
            _join(module)
    return packed.requires_grad_(False)


def _convert(module: nn.Module) -> nn.Module:
    make = PACKED.get(type(module))
    if make is not None:
        return make(module)
    if isinstance(module, PositionalConv1d):
        return module.fold()  # the same weight, which would otherwise be normalized for each input
    for name, child in module.named_children():
        setattr(module, name, _convert(child))
    return module


def convert_rest(packed: nn.Module, rest: torch.dtype) -> None:
    """Make a packed model compute in `rest`, in place; scales and biases of binary layers are float32."""
    for module in packed.modules():
        _to(module, torch.float32 if isinstance(module, (PackedLinear, PackedConv1d, PackedQuantizer)) else rest)


def _to(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert a module's own float parameters and buffers, not those of its submodules."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_floating_point() and buffer.dtype != dtype:
            module._buffers[name] = buffer.to(dtype)


def _codes(codes: Any) -> Any:
    """Replaces an activation that joined layers have applied already."""
    return codes


def _join(owner: nn.Module) -> None:
    """Let packed layers return bits where only a quantizer reads them: the first of two feed-forward layers with only a ReLU between them,
    and projections to queries and keys whose heads fill whole words."""
    parts = [(name, kind) for name, kind in kinds_of(owner).items() if kind.name == FEED_FORWARD]
    for (first_name, _), (second_name, kind) in zip(parts, parts[1:]):
        first, second = getattr(owner, first_name), getattr(owner, second_name)
        if kind.activation and isinstance(first, PackedLinear) and isinstance(second, PackedLinear) and second.input is not None:
            first.feed(second.input)
            setattr(owner, kind.activation, _codes)
    if isinstance(owner, SelfAttention) and type(owner.products) in (PackedAttention, PackedSparseAttention):
        products: Any = owner.products
        for projection, reader in ((owner.q_proj, products.query), (owner.k_proj, products.key)):
            if isinstance(projection, PackedLinear) and projection.out_features // owner.heads % WORD == 0:
                projection.feed(reader)
