"""Rewrites a trained encoder in the layout and order of operations that suit accelerators: (B, C, 1, T), head by head (layers/grid.py)."""

# B batch, T frames, D model dim

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..config import MEL_FRONTS
from ..encoders.base import Encoder
from ..errors import UserError
from ..layers.chunks import Chunks
from ..layers.grid import ChannelsFirst, GridAttention, GridConv, GridNorm, grid_norm
from ..layers.position import PositionalConv1d
from ..models.fuse import fuse
from ..models.hubert import HubertModel
from .numerics import MadLayerNorm, conditional_softmax, mad_layer_norm

M = TypeVar("M", bound=nn.Module)

PLAIN, STABLE, HALF = "plain", "stable", "half"
FORMS = {  # form of a rewritten model, by its name in files
    PLAIN: "channels first",
    STABLE: "channels first; LayerNorm and softmax that stay finite if a compiler runs them in float16",
    HALF: "channels first (batch, channels, 1, frames), computed in float16",
}


class GridEncoder(nn.Module):
    """An `Encoder` of the same weights for inference, in whole or in chunks; (B, T, input_dim) -> (B, T, D)."""

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
        self.pos_conv = GridConv(embedding.plain_weight(), embedding.bias, embedding.groups, embedding.causal)
        self.layers = nn.ModuleList(blocks)
        self.layer_norm = grid_norm(source.layer_norm)
        self.layer_norm_first = source.layer_norm_first
        self.chunk_multiple, self.attention_block = source.chunk_multiple, source.attention_block
        self.source = _hollow(source)  # computes what blocks need to know of a batch

    def set_num_updates(self, num_updates: int) -> None:
        """Do nothing; `Encoder` has this method for training."""

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, layer: int | None = None, chunks: Chunks | None = None) -> Tensor:
        """Compute what `Encoder.forward` does."""
        return self.hidden_states(x, padding_mask, chunks)[-1 if layer is None else layer]

    def hidden_states(self, x: Tensor, padding_mask: Tensor | None = None, chunks: Chunks | None = None) -> list[Tensor]:
        """Compute what `Encoder.hidden_states` does."""
        x = x.to(self.pos_conv.weight.dtype)
        valid = None if padding_mask is None else ~padding_mask
        frames = self.source.frames(x, valid, chunks)
        x = x.transpose(1, 2).unsqueeze(2)  # (B, D, 1, T)
        x = x if valid is None else x.masked_fill(~valid[:, None, None], 0.0)
        x = x + nn.functional.gelu(self.pos_conv.over_time(x, chunks))
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        states = [x]
        for block in self.layers:
            states.append(x := block(x, frames))
        if self.layer_norm_first:
            states[-1] = self.layer_norm(x)
        if valid is not None:
            states = [state.masked_fill(~valid[:, None, None], 0.0) for state in states]
        return [state.squeeze(2).transpose(1, 2) for state in states]


def _hollow(source: Encoder) -> Encoder:
    """A copy of the encoder without its modules, which positions and masks do not need."""
    hollow = copy.copy(source)
    hollow._modules = {}
    return hollow.eval()


def rewrite(model: M, half: bool = False, stable: bool = False) -> M:
    """Make a fused copy of a HuBERT (or of its encoder) for inference whose encoder runs channels first, head by head, with equal outputs.

    It takes padding and chunks as the source does, streams if the source does, and is exported and loaded with its form (`model.edge`).
    stable: give every LayerNorm the MAD pre-normalizer, and use conditional softmax (numerics.py): equal in float32, and finite if a
    compiler runs the graph in float16. half: compute the encoder, and a log-mel front behind its spectrogram, in float16; stable, and
    equal within that precision. Raises `UserError` for an encoder without such a form (sparse attention, a changing frame rate), and for a
    binarized model.
    """
    rewritten = fuse(model)
    encoder = rewritten if isinstance(rewritten, Encoder) else getattr(rewritten, "encoder", None)
    if not isinstance(encoder, Encoder):
        raise UserError(f"cannot rewrite a {type(model).__name__}: expected a HubertModel or its encoder, not rewritten yet")
    stable = stable or half
    with torch.no_grad():
        grid = GridEncoder(encoder).eval().requires_grad_(False)
    if stable:
        for module in grid.modules():
            if isinstance(module, GridNorm):
                module.norm = mad_layer_norm
            elif isinstance(module, GridAttention):
                module.softmax = conditional_softmax
    if half:
        grid.half()
    if rewritten is encoder:
        return grid  # type: ignore[return-value]
    rewritten.encoder = grid
    if isinstance(rewritten, HubertModel):
        rewritten.edge = HALF if half else STABLE if stable else PLAIN
        _prepare_front(rewritten, stable, half)
    return rewritten


def _prepare_front(model: HubertModel, stable: bool, half: bool) -> None:
    """Give a log-mel front the numerics of the encoder; a waveform extractor stays as it is."""
    if model.config.conv_feature_layers not in MEL_FRONTS:
        return
    if stable and isinstance(model.layer_norm, nn.LayerNorm):
        model.layer_norm.__class__ = MadLayerNorm
    if half:
        for part in (model.feature_extractor.front, model.layer_norm, model.post_extract_proj):
            if part is not None:
                part.half()


def rewritten_as(model: HubertModel, form: str) -> HubertModel:
    """Make a copy in one of `FORMS`."""
    return rewrite(model, half=form == HALF, stable=form != PLAIN)
