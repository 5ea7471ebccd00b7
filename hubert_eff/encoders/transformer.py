"""Transformer encoder of HuBERT (post-LN by default); names of parameters and results are fairseq's."""

# B batch, T frames, D model dim

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ..config import HubertConfig
from ..layers.attention import SelfAttention
from ..layers.dropout import Dropout
from ..layers.grid import GridBlock, Residual, grid_norm, pointwise
from ..layers.kinds import FEED_FORWARD, Kind
from ..layers.linear import Linear
from .base import DEBUG, DEEP_NARROW, HUBERT_BASE, SHALLOW_WIDE, Encoder, Frames
from .registry import register_encoder


@dataclass
class TransformerConfig(HubertConfig):
    """A Transformer HuBERT; the defaults are HuBERT-base's sizes."""


class TransformerBlock(nn.Module):
    """Self-attention, then Linear, GELU, Linear; LayerNorm after each residual sum, or before each module (pre-LN)."""

    def __init__(self, config: HubertConfig, attention: SelfAttention) -> None:
        super().__init__()
        dim = config.encoder_embed_dim
        self.pre_norm = config.layer_norm_first
        self.self_attn = attention
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = Linear(dim, config.encoder_ffn_embed_dim)
        self.fc2 = Linear(config.encoder_ffn_embed_dim, dim)
        self.activation: Callable[[Tensor], Tensor] = F.gelu
        self.final_layer_norm = nn.LayerNorm(dim)
        self.dropout = Dropout(config.dropout)
        self.activation_dropout = Dropout(config.activation_dropout)

    def kinds(self) -> Mapping[str, Kind]:
        """Declare the kinds of the parts (`layers.kinds.Declared`)."""
        return {"fc1": Kind(FEED_FORWARD), "fc2": Kind(FEED_FORWARD, signed=False, activation="activation")}

    def channels_first(self) -> GridBlock:
        """Build the channels-first twin (`layers.grid`)."""
        norms = grid_norm(self.self_attn_layer_norm), grid_norm(self.final_layer_norm)
        attention, forward = [self.self_attn.channels_first()], [pointwise(self.fc1), nn.GELU(), pointwise(self.fc2)]
        if self.pre_norm:
            return GridBlock(Residual(norms[0], *attention), Residual(norms[1], *forward))
        return GridBlock(Residual(*attention), norms[0], Residual(*forward), norms[1])

    def forward(self, x: Tensor, frames: Frames) -> Tensor:  # (B, T, D)
        if self.pre_norm:
            x = x + self.dropout(self.self_attn(self.self_attn_layer_norm(x), frames.attend, frames.chunks))
            return x + self.feed_forward(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.dropout(self.self_attn(x, frames.attend, frames.chunks)))
        return self.final_layer_norm(x + self.feed_forward(x))  # type: ignore[no-any-return]

    def feed_forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.dropout(self.fc2(self.activation_dropout(self.activation(self.fc1(x)))))  # type: ignore[no-any-return]


@register_encoder(
    "transformer",
    config=TransformerConfig,
    presets={
        "transformer-base": HUBERT_BASE,  # with the FastConv extractor
        # the sizes of sparseformer-dn-s and -sw-s with the dense attention that Table 1 of "Attention or Convolution" counts for them
        "transformer-dn-s": DEEP_NARROW,
        "transformer-sw-s": SHALLOW_WIDE,
        "transformer-debug": DEBUG,
    },
)
class TransformerEncoder(Encoder):
    """A stack of `TransformerBlock`."""

    chunk_multiple = 1

    def build_block(self, config: HubertConfig, index: int) -> nn.Module:
        attention = SelfAttention(config.encoder_embed_dim, config.encoder_attention_heads, config.attention_dropout)
        return TransformerBlock(config, attention)
