"""Conformer encoder (Gulati et al. 2020)."""

# B batch, T frames, D model dim

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ODD, HubertConfig, option
from ..errors import UserError
from ..layers.activation import silu
from ..layers.attention import RelativeSelfAttention, SelfAttention
from ..layers.chunks import Chunks
from ..layers.convolution import DepthwiseConv
from ..layers.dropout import Dropout
from ..layers.feedforward import ConformerFeedForward
from ..layers.folding import fold_after, fold_before
from ..layers.grid import Glu, GridBlock, Residual, depthwise, grid_norm, pointwise
from ..layers.kinds import DEPTHWISE, POINTWISE, Kind
from ..layers.linear import Linear
from ..layers.norm import NORMS, MaskedBatchNorm, norm_of
from ..layers.position import relative_sinusoids
from .base import DEBUG, Encoder, Frames, published_size
from .registry import register_encoder


@dataclass
class ConformerConfig(HubertConfig):
    """A Conformer HuBERT."""

    depthwise_conv_kernel_size: int = option(31, "kernel of the depthwise convolution, in frames", bounds=ODD)
    pos_enc_type: str = option(
        "rel_pos",
        "relative positions in the attention, or only the convolutional positional embedding",
        ("rel_pos", "abs"),
    )
    conv_module_bias: bool = option(False, "biases in the convolution module (torchaudio's Conformer has them, fairseq's does not)")
    block_norm: str = option(
        "layer_norm", "norms of the blocks; with batch_norm or none the encoder has no norms outside its blocks either", NORMS
    )

    def validate(self) -> None:
        super().validate()
        if self.layer_norm_first and self.block_norm != "layer_norm":
            raise UserError(f"layer_norm_first=True: with block_norm={self.block_norm} there is no such LayerNorm; set it to false")


class ConvolutionModule(nn.Module):
    """LayerNorm (or `norm`), pointwise D -> 2D, GLU, depthwise, BatchNorm, SiLU, pointwise D -> D (Conformer, section 2.2)."""

    def __init__(self, dim: int, kernel: int, bias: bool, dropout: float, norm: str = "layer_norm", causal: bool = False) -> None:
        super().__init__()
        self.layer_norm = norm_of(norm, dim)
        self.pointwise_conv1 = Linear(dim, 2 * dim, bias=bias)
        self.depthwise_conv = DepthwiseConv(dim, kernel, bias=bias, causal=causal)
        self.batch_norm: nn.Module = MaskedBatchNorm(dim)
        self.pointwise_conv2 = Linear(dim, dim, bias=bias)
        self.activation = silu
        self.dropout = Dropout(dropout)

    def fold(self) -> ConvolutionModule:
        """Fold the BatchNorm into the depthwise convolution, and a BatchNorm that replaces LayerNorm into the next layer."""
        self.layer_norm = fold_before(self.layer_norm, self.pointwise_conv1)
        self.batch_norm = fold_after(self.depthwise_conv, self.batch_norm)
        return self

    def channels_first(self) -> nn.Module:
        """Build the channels-first twin (`layers.grid`)."""
        inner = pointwise(self.pointwise_conv1), Glu(), depthwise(self.depthwise_conv), nn.SiLU(), pointwise(self.pointwise_conv2)
        return GridBlock(grid_norm(self.layer_norm), *inner)

    def kinds(self) -> Mapping[str, Kind]:
        """Declare the kinds of the parts (`layers.kinds.Declared`)."""
        return {
            "pointwise_conv1": Kind(POINTWISE),
            "depthwise_conv": Kind(DEPTHWISE),
            "pointwise_conv2": Kind(POINTWISE, signed=False, activation="activation"),
        }

    def forward(self, x: Tensor, valid: Tensor | None, chunks: Chunks | None = None) -> Tensor:  # (B, T, D)
        x = F.glu(self.pointwise_conv1(self.layer_norm(x, valid)))
        if valid is not None:  # the kernel must not carry padding into valid frames
            x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
        x = self.activation(self.batch_norm(self.depthwise_conv(x, chunks), valid))
        return self.dropout(self.pointwise_conv2(x))  # type: ignore[no-any-return]


class ConformerBlock(nn.Module):
    """Half-step feed-forward, self-attention, convolution, half-step feed-forward, LayerNorm (Conformer, equation 1)."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        dim, inner, heads = config.encoder_embed_dim, config.encoder_ffn_embed_dim, config.encoder_attention_heads
        norm = config.block_norm
        self.ffn1 = ConformerFeedForward(dim, inner, config.dropout, config.activation_dropout, norm)
        self.self_attn_layer_norm = norm_of(norm, dim)
        attention = RelativeSelfAttention if config.pos_enc_type == "rel_pos" else SelfAttention
        self.self_attn = attention(dim, heads, config.attention_dropout)
        self.conv_module = ConvolutionModule(
            dim, config.depthwise_conv_kernel_size, config.conv_module_bias, config.dropout, norm, config.causal
        )
        self.ffn2 = ConformerFeedForward(dim, inner, config.dropout, config.activation_dropout, norm)
        self.final_layer_norm = norm_of(norm, dim)
        self.dropout = Dropout(config.dropout)

    def fold(self) -> ConformerBlock:
        """Fold a BatchNorm into the projections that read it. The last one stays, since the next residual sum also reads it."""
        self.self_attn_layer_norm = fold_before(self.self_attn_layer_norm, *self.self_attn.projections())
        return self

    def channels_first(self) -> GridBlock:
        """Build the channels-first twin (`layers.grid`)."""
        return GridBlock(
            Residual(self.ffn1.channels_first(), factor=0.5),
            Residual(grid_norm(self.self_attn_layer_norm), self.self_attn.channels_first()),
            Residual(self.conv_module.channels_first()),
            Residual(self.ffn2.channels_first(), factor=0.5),
            grid_norm(self.final_layer_norm),
        )

    def forward(self, x: Tensor, frames: Frames) -> Tensor:  # (B, T, D)
        x = torch.add(x, self.ffn1(x, frames.valid), alpha=0.5)
        normed = self.self_attn_layer_norm(x, frames.valid)
        if frames.positions is None:
            mixed = self.self_attn(normed, frames.attend, frames.chunks)
        else:
            mixed = self.self_attn(normed, frames.positions, frames.attend, frames.chunks)
        x = x + self.dropout(mixed)
        x = x + self.conv_module(x, frames.valid, frames.chunks)
        x = torch.add(x, self.ffn2(x, frames.valid), alpha=0.5)
        return self.final_layer_norm(x, frames.valid)  # type: ignore[no-any-return]


TABLE1 = {**published_size(16, 144, 4), "pos_enc_type": "abs", "required_seq_len_multiple": 2}


@register_encoder(
    "conformer",
    config=ConformerConfig,
    presets={
        # Conformer (S), (M), (L) of the paper's table 1; pre-training keys as in HuBERT-base
        "conformer-s": published_size(16, 144, 4),
        "conformer-m": published_size(16, 256, 4),
        "conformer-l": published_size(17, 512, 8),
        # the models of storage (fairseq's defaults around Conformer (S)) and of FLOP in Table 1 of "Attention or Convolution"
        "conformer-s-table1": {**TABLE1, "encoder_ffn_embed_dim": 3072},
        "conformer-s-ffn1024": {**TABLE1, "encoder_ffn_embed_dim": 1024},
        # Conformer (S) for small devices (Xu et al. 2024): log-mel front, separable subsampling, streaming; `edge.rewrite` does the rest
        "conformer-edge": {**published_size(16, 144, 4), "conv_feature_layers": "logmel-dws", "streaming": True},
        "conformer-debug": {**DEBUG, "depthwise_conv_kernel_size": 15},
    },
)
class ConformerEncoder(Encoder):
    """A stack of `ConformerBlock`; with `rel_pos` all blocks share one table of sinusoids."""

    chunk_multiple = 1
    relative: bool

    def build_block(self, config: HubertConfig, index: int) -> nn.Module:
        assert isinstance(config, ConformerConfig)
        self.relative = config.pos_enc_type == "rel_pos"
        return ConformerBlock(config)

    def build_norm(self, config: HubertConfig) -> nn.Module:
        assert isinstance(config, ConformerConfig)
        return super().build_norm(config) if config.block_norm == "layer_norm" else nn.Identity()

    def positions(self, x: Tensor, keys: int) -> Tensor | None:
        return relative_sinusoids(keys, x.size(2), x) if self.relative else None
