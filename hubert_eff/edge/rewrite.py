"""A trained encoder in the layout and the order of operations that accelerators like: (B, C, 1, T), head by head (layers/grid.py)."""

# B batch, T frames, D model dim

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ..encoders.base import Encoder
from ..errors import UserError
from ..layers.chunks import Chunks
from ..layers.convolution import GroupedConv2d
from ..layers.grid import ChannelsFirst, GridAttention, GridNorm, grid_norm
from ..layers.position import PositionalConv1d
from ..models.fuse import fuse
from .numerics import conditional_softmax, mad_layer_norm

M = TypeVar("M", bound=nn.Module)


class GridEncoder(nn.Module):
    """An `Encoder` of the same weights, for whole utterances of one length; (B, T, input_dim) -> (B, T, D)."""

    chunk_multiple = None

    def __init__(self, source: Encoder) -> None:
        super().__init__()
        if type(source).run_blocks is not Encoder.run_blocks:
            raise UserError(f"a {type(source).__name__} cannot be rewritten: it changes the frame rate between its blocks")
        blocks = []
        for block in source.layers:
            if not isinstance(block, ChannelsFirst):
                raise UserError(f"a {type(source).__name__} cannot be rewritten: its {type(block).__name__} has no channels_first()")
            blocks.append(block.channels_first())
        embedding = source.pos_conv[0]
        assert isinstance(embedding, PositionalConv1d)
        weight = embedding.plain_weight().detach().unsqueeze(2)  # (D, D / groups, 1, k)
        self.reach = (weight.size(3) - 1, 0) if embedding.causal else (weight.size(3) // 2, (weight.size(3) - 1) // 2)
        self.pos_conv = GroupedConv2d(weight.size(0), weight.size(0), (1, weight.size(3)), groups=embedding.groups, device="meta")
        self.pos_conv.weight, self.pos_conv.bias = nn.Parameter(weight.clone()), nn.Parameter(embedding.bias.detach().clone())
        self.layers = nn.ModuleList(blocks)
        self.layer_norm = grid_norm(source.layer_norm)
        self.layer_norm_first = source.layer_norm_first
        self.positions = source.positions  # without parameters

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, layer: int | None = None, chunks: Chunks | None = None) -> Tensor:
        """As `Encoder.forward`."""
        return self.hidden_states(x, padding_mask, chunks)[-1 if layer is None else layer]

    def hidden_states(self, x: Tensor, padding_mask: Tensor | None = None, chunks: Chunks | None = None) -> list[Tensor]:
        """As `Encoder.hidden_states`; raises `UserError` for padding and for chunks."""
        if chunks is not None or (padding_mask is not None and bool(padding_mask.any())):
            raise UserError("a rewritten model takes whole utterances of one length: leave out padding_mask and chunk_size")
        x = x.to(self.pos_conv.weight.dtype)
        positions = self.positions(x, x.size(1))
        x = x.transpose(1, 2).unsqueeze(2)  # (B, D, 1, T)
        x = x + nn.functional.gelu(self.pos_conv(nn.functional.pad(x, self.reach)))
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        states = [x]
        for block in self.layers:
            states.append(x := block(x, positions))
        if self.layer_norm_first:
            states[-1] = self.layer_norm(x)
        return [state.squeeze(2).transpose(1, 2) for state in states]


def rewrite(model: M, half: bool = False) -> M:
    """A copy of a HuBERT (or of its encoder) for inference whose encoder runs channels first, head by head; fused, with equal outputs.

    half: in float16, with the MAD pre-normalizer in every LayerNorm and conditional softmax (numerics.py), and so within its precision.
    Raises `UserError` for an encoder that has no such form (sparse attention, a frame rate that changes), and for a binarized model.
    """
    rewritten = fuse(model)
    encoder = rewritten if isinstance(rewritten, Encoder) else getattr(rewritten, "encoder", None)
    if not isinstance(encoder, Encoder):
        raise UserError(f"cannot rewrite a {type(model).__name__}: expected a HubertModel or its encoder, not rewritten yet")
    with torch.no_grad():
        grid = GridEncoder(encoder).eval().requires_grad_(False)
    if half:
        for module in grid.half().modules():
            if isinstance(module, GridNorm):
                module.norm = mad_layer_norm
            elif isinstance(module, GridAttention):
                module.softmax = conditional_softmax
    if rewritten is encoder:
        return grid  # type: ignore[return-value]
    rewritten.encoder = grid
    return rewritten
