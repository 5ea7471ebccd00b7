"""FusionFormer encoder (Song et al. 2022): a Conformer that has no norms once it is fused for inference."""

# B batch, T frames, D model dim, H heads

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ODD, Bounds, HubertConfig, option
from ..errors import UserError
from ..layers.attention import attention
from ..layers.chunks import Chunks
from ..layers.convolution import DepthwiseConv
from ..layers.dropout import Dropout
from ..layers.folding import fold_after
from ..layers.grid import GridAttention, GridBlock, Residual, depthwise, pointwise
from ..layers.kinds import DEPTHWISE, FEED_FORWARD, POINTWISE, PRODUCT, PROJECTION, Kind, head_shapes
from ..layers.linear import Linear
from ..layers.norm import MaskedBatchNorm
from .base import DEBUG, Encoder, Frames, published_size
from .registry import register_encoder


@dataclass
class FusionformerConfig(HubertConfig):
    """A FusionFormer HuBERT. Options cover what the paper leaves open in the convolution module; defaults are the cheapest reading."""

    depthwise_conv_kernel_size: int = option(15, "kernel of the depthwise convolution, in frames", bounds=ODD)
    conv_module_expansion: int = option(
        1,
        "channels inside the convolution module in units of D: 1, or 2 as in a Conformer's first pointwise convolution",
        bounds=Bounds(1, 2),
    )
    conv_module_relu: str = option(
        "both", "layers of the convolution module before a ReLU: the first pointwise, the depthwise, or both",
        ("both", "pointwise", "depthwise"),
    )  # fmt: skip

    def validate(self) -> None:
        super().validate()
        if self.layer_norm_first:
            raise UserError("layer_norm_first=True: a FusionFormer has no LayerNorm; set it to false")


# In every module a layer without bias is followed directly by a BatchNorm; the two fold into one layer with a bias.


class FeedForward(nn.Module):
    """Linear D -> F, BatchNorm, ReLU, Linear F -> D, BatchNorm."""

    def __init__(self, config: FusionformerConfig) -> None:
        super().__init__()
        dim, inner = config.encoder_embed_dim, config.encoder_ffn_embed_dim
        self.w_1 = Linear(dim, inner, bias=False)
        self.norm_1: nn.Module = MaskedBatchNorm(inner)
        self.w_2 = Linear(inner, dim, bias=False)
        self.norm_2: nn.Module = MaskedBatchNorm(dim)
        self.activation_dropout = Dropout(config.activation_dropout)
        self.dropout = Dropout(config.dropout)

    def fold(self) -> FeedForward:
        """Fold the norms."""
        self.norm_1 = fold_after(self.w_1, self.norm_1)
        self.norm_2 = fold_after(self.w_2, self.norm_2)
        return self

    def kinds(self) -> Mapping[str, Kind]:
        """Declare the kinds of the parts (`layers.kinds.Declared`)."""
        return {"w_1": Kind(FEED_FORWARD), "w_2": Kind(FEED_FORWARD, signed=False)}

    def channels_first(self) -> nn.Module:
        """Build the channels-first twin (`layers.grid`)."""
        return nn.Sequential(pointwise(self.w_1), nn.ReLU(), pointwise(self.w_2))

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:  # (B, T, D)
        x = self.activation_dropout(F.relu(self.norm_1(self.w_1(x), valid), inplace=True))
        return self.dropout(self.norm_2(self.w_2(x), valid))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self-attention with a BatchNorm after the joint projection to queries, keys and values, and one after the last projection."""

    def __init__(self, config: FusionformerConfig) -> None:
        super().__init__()
        dim = config.encoder_embed_dim
        self.heads = config.encoder_attention_heads
        self.qkv_proj = Linear(dim, 3 * dim, bias=False)
        self.qkv_norm: nn.Module = MaskedBatchNorm(3 * dim)
        self.out_proj = Linear(dim, dim, bias=False)
        self.out_norm: nn.Module = MaskedBatchNorm(dim)
        self.products: nn.Module | None = None  # replaces `attention` once binarized
        self.attention_dropout = config.attention_dropout
        self.dropout = Dropout(config.dropout)

    def fold(self) -> Attention:
        """Fold the norms. The factor 1 / sqrt(d) stays in the attention kernel, where it costs nothing."""
        self.qkv_norm = fold_after(self.qkv_proj, self.qkv_norm)
        self.out_norm = fold_after(self.out_proj, self.out_norm)
        return self

    def kinds(self) -> Mapping[str, Kind]:
        """Declare the kinds of the parts (`layers.kinds.Declared`)."""
        shapes = head_shapes(self.heads, self.out_proj.in_features // self.heads, "query", "key", "value")
        products = Kind(PRODUCT, form="dense", shapes=shapes)
        return {"qkv_proj": Kind(PROJECTION), "products": products, "out_proj": Kind(PROJECTION)}

    def output_parts(self) -> Mapping[str, tuple[str, ...]]:
        """Declare parts of outputs for `analysis.layer_trends`; the paper's figures have rows of queries, keys and values."""
        return {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def channels_first(self) -> GridAttention:
        """Build the channels-first twin (`layers.grid`)."""
        return GridAttention(self.qkv_proj, self.out_proj, self.heads)

    def heads_of(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, T, D / H)."""
        qkv = self.qkv_norm(self.qkv_proj(x), valid)  # (B, T, 3 D)
        q, k, v = qkv.view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def energies(self, x: Tensor, frames: Frames) -> Tensor:
        """The input of the softmax, (B, H, T, T), for analysis."""
        q, k, _ = self.heads_of(x, frames.valid)
        return torch.matmul(q * q.size(-1) ** -0.5, k.mT)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:  # (B, T, D)
        q, k, v = self.heads_of(x, frames.valid)
        dropout = self.attention_dropout if self.training else 0.0
        if self.products is not None:
            mixed = self.products(q, k, v, frames.attend, dropout, frames.chunks)
        else:
            k, v = (k, v) if frames.chunks is None else frames.chunks.with_kept(self, k, v)
            mixed = attention(q, k, v, frames.attend, dropout)
        return self.dropout(self.out_norm(self.out_proj(mixed.transpose(1, 2).flatten(2)), frames.valid))  # type: ignore[no-any-return]


class ConvolutionModule(nn.Module):
    """Pointwise D -> E, depthwise, pointwise E -> D, each with its BatchNorm; ReLU replaces GLU and SiLU."""

    def __init__(self, config: FusionformerConfig) -> None:
        super().__init__()
        dim = config.encoder_embed_dim
        inner = dim * config.conv_module_expansion
        self.pointwise_conv1 = Linear(dim, inner, bias=False)
        self.norm_1: nn.Module = MaskedBatchNorm(inner)
        self.depthwise_conv = DepthwiseConv(inner, config.depthwise_conv_kernel_size, causal=config.causal)
        self.norm_2: nn.Module = MaskedBatchNorm(inner)
        self.pointwise_conv2 = Linear(inner, dim, bias=False)
        self.norm_3: nn.Module = MaskedBatchNorm(dim)
        self.relu_1 = config.conv_module_relu != "depthwise"
        self.relu_2 = config.conv_module_relu != "pointwise"
        self.dropout = Dropout(config.dropout)

    def fold(self) -> ConvolutionModule:
        """Fold the norms. All follow their layers, so the zero padding of the depthwise convolution does not matter."""
        self.norm_1 = fold_after(self.pointwise_conv1, self.norm_1)
        self.norm_2 = fold_after(self.depthwise_conv, self.norm_2)
        self.norm_3 = fold_after(self.pointwise_conv2, self.norm_3)
        return self

    def kinds(self) -> Mapping[str, Kind]:
        """Declare the kinds of the parts (`layers.kinds.Declared`)."""
        return {
            "pointwise_conv1": Kind(POINTWISE),
            "depthwise_conv": Kind(DEPTHWISE, signed=not self.relu_1),
            "pointwise_conv2": Kind(POINTWISE, signed=not self.relu_2),
        }

    def channels_first(self) -> nn.Module:
        """Build the channels-first twin (`layers.grid`)."""
        relus = [nn.ReLU() if relu else nn.Identity() for relu in (self.relu_1, self.relu_2)]
        return GridBlock(
            pointwise(self.pointwise_conv1), relus[0], depthwise(self.depthwise_conv), relus[1], pointwise(self.pointwise_conv2)
        )

    def forward(self, x: Tensor, valid: Tensor | None, chunks: Chunks | None = None) -> Tensor:  # (B, T, D)
        x = self.norm_1(self.pointwise_conv1(x), valid)
        if self.relu_1:
            x = F.relu(x, inplace=True)
        if valid is not None:  # the kernel must not carry padding into valid frames
            x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
        x = self.norm_2(self.depthwise_conv(x, chunks), valid)
        if self.relu_2:
            x = F.relu(x, inplace=True)
        return self.dropout(self.norm_3(self.pointwise_conv2(x), valid))  # type: ignore[no-any-return]


class FusionformerBlock(nn.Module):
    """The residual sums of a Conformer block without its LayerNorms."""

    def __init__(self, config: FusionformerConfig) -> None:
        super().__init__()
        self.ffn1 = FeedForward(config)
        self.self_attn = Attention(config)
        self.conv_module = ConvolutionModule(config)
        self.ffn2 = FeedForward(config)

    def channels_first(self) -> GridBlock:
        """Build the channels-first twin (`layers.grid`)."""
        return GridBlock(
            Residual(self.ffn1.channels_first(), factor=0.5),
            Residual(self.self_attn.channels_first()),
            Residual(self.conv_module.channels_first()),
            Residual(self.ffn2.channels_first(), factor=0.5),
        )

    def forward(self, x: Tensor, frames: Frames) -> Tensor:  # (B, T, D)
        x = torch.add(x, self.ffn1(x, frames.valid), alpha=0.5)
        x = x + self.self_attn(x, frames)
        x = x + self.conv_module(x, frames.valid, frames.chunks)
        return torch.add(x, self.ffn2(x, frames.valid), alpha=0.5)


def published(layers: int, dim: int, heads: int) -> dict[str, Any]:
    """Keys of a preset with a published size."""
    return {**published_size(layers, dim, heads), "encoder_ffn_embed_dim": 2048}


@register_encoder(
    "fusionformer",
    config=FusionformerConfig,
    presets={
        "fusionformer-s": published(12, 256, 4),
        # the encoders of the paper's models of 48 and 98 million parameters, which they reach only with 2 D in the convolution module
        "fusionformer-12x256": {**published(12, 256, 4), "conv_module_expansion": 2},
        "fusionformer-16x384": {**published(16, 384, 6), "conv_module_expansion": 2},
        "fusionformer-debug": DEBUG,
    },
)
class FusionformerEncoder(Encoder):
    """A stack of `FusionformerBlock`, without a norm before or after it."""

    chunk_multiple = 1

    def build_block(self, config: HubertConfig, index: int) -> nn.Module:
        assert isinstance(config, FusionformerConfig)
        return FusionformerBlock(config)

    def build_norm(self, config: HubertConfig) -> nn.Module:
        return nn.Identity()
