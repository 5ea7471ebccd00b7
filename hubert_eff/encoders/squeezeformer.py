"""Squeezeformer encoder (Kim et al. 2022): post-LN blocks; those in the middle run at half the frame rate (temporal U-Net)."""

# B batch, T frames, D model dim

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import NOT_NEGATIVE, ODD, HubertConfig, option
from ..errors import UserError
from ..layers.activation import silu
from ..layers.attention import RelativeSelfAttention, SelfAttention
from ..layers.chunks import Chunks
from ..layers.convolution import DepthwiseConv
from ..layers.dropout import Dropout
from ..layers.feedforward import ConformerFeedForward
from ..layers.folding import fold_affine, fold_after
from ..layers.kinds import DEPTHWISE, POINTWISE, RATE_CHANGE, Kind
from ..layers.linear import Linear
from ..layers.norm import MaskedBatchNorm, NoNorm
from ..layers.position import relative_sinusoids, repeated
from ..layers.tracing import every
from .base import DEBUG, Encoder, Frames, published_size
from .conformer import ConformerBlock, ConformerConfig
from .registry import register_encoder

REDUCTION_KERNEL = 5
BATCH_NORM_MOMENTUM = 0.015  # 0.985 in Keras' convention


@dataclass
class SqueezeformerConfig(HubertConfig):
    """A Squeezeformer HuBERT. Blocks are counted from 0."""

    time_reduce_idx: int = option(5, "block before which the frame rate is halved (20 to 40 ms)", bounds=NOT_NEGATIVE)
    time_recover_idx: int = option(11, "block before which the frame rate is restored; blocks from time_reduce_idx on run at 40 ms")
    depthwise_conv_kernel_size: int = option(31, "kernel of the depthwise convolution, in frames at the block's own rate", bounds=ODD)
    pos_enc_type: str = option(
        "rel_pos",
        "relative positions in the attention, or only the convolutional positional embedding",
        ("rel_pos", "abs"),
    )
    layer_type: str = option(
        "squeezeformer", "type of the blocks: the paper's or fairseq's Conformer blocks", ("squeezeformer", "conformer")
    )

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.time_reduce_idx < self.time_recover_idx < self.encoder_layers:
            raise UserError(
                f"time_reduce_idx={self.time_reduce_idx}, time_recover_idx={self.time_recover_idx}, encoder_layers={self.encoder_layers}: "
                "the rate is halved before it is restored, and restored before the last block: 0 <= time_reduce_idx < time_recover_idx "
                "< encoder_layers"
            )
        if self.layer_norm_first:
            raise UserError("layer_norm_first=True: a Squeezeformer has its LayerNorm before the first block; set it to false")


class ScaleBias(nn.Module):
    """weight * x + bias per channel, (..., D) -> (..., D): the adaptive scaling before each module (Squeezeformer, section 3.2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, self.weight, x)


def _fold_scale(scale: nn.Module, *layers: nn.Linear) -> nn.Module:
    """Fold a `ScaleBias` into the linear layers that read it; returns its replacement."""
    if not isinstance(scale, ScaleBias):
        return scale  # folded already
    for layer in layers:
        fold_affine(layer, scale.weight, scale.bias)
    return NoNorm()


class ConvolutionModule(nn.Module):
    """Pointwise D -> 2D, SiLU, depthwise, BatchNorm, SiLU, pointwise 2D -> D; no GLU (Squeezeformer, section 3.2)."""

    def __init__(self, dim: int, kernel: int, dropout: float, causal: bool = False) -> None:
        super().__init__()
        self.pointwise_conv1 = Linear(dim, 2 * dim)
        self.depthwise_conv = DepthwiseConv(2 * dim, kernel, causal=causal)  # the BatchNorm provides the bias
        self.batch_norm: nn.Module = MaskedBatchNorm(2 * dim, momentum=BATCH_NORM_MOMENTUM)
        self.pointwise_conv2 = Linear(2 * dim, dim)
        self.activation_1 = self.activation_2 = silu
        self.dropout = Dropout(dropout)

    def kinds(self) -> Mapping[str, Kind]:
        """Declare the kinds of the parts (`layers.kinds.Declared`)."""
        return {
            "pointwise_conv1": Kind(POINTWISE),
            "depthwise_conv": Kind(DEPTHWISE, signed=False, activation="activation_1"),
            "pointwise_conv2": Kind(POINTWISE, signed=False, activation="activation_2"),
        }

    def forward(self, x: Tensor, valid: Tensor | None, chunks: Chunks | None = None) -> Tensor:  # (B, T, D)
        x = self.activation_1(self.pointwise_conv1(x))
        if valid is not None:  # the kernel must not carry padding into valid frames
            x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
        x = self.activation_2(self.batch_norm(self.depthwise_conv(x, chunks), valid))
        return self.dropout(self.pointwise_conv2(x))  # type: ignore[no-any-return]

    def fold(self) -> ConvolutionModule:
        """Fold the BatchNorm into the depthwise convolution."""
        self.batch_norm = fold_after(self.depthwise_conv, self.batch_norm)
        return self


class SqueezeformerBlock(nn.Module):
    """x <- LayerNorm(x + f(scale * x + bias)), f = attention, feed-forward, convolution, feed-forward (Squeezeformer, figure 3)."""

    def __init__(self, config: SqueezeformerConfig) -> None:
        super().__init__()
        dim, inner, dropout = config.encoder_embed_dim, config.encoder_ffn_embed_dim, config.dropout
        attention = RelativeSelfAttention if config.pos_enc_type == "rel_pos" else SelfAttention
        self.self_attn_scale: nn.Module = ScaleBias(dim)
        self.self_attn = attention(dim, config.encoder_attention_heads, config.attention_dropout)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.ffn1_scale: nn.Module = ScaleBias(dim)
        self.ffn1 = ConformerFeedForward(dim, inner, dropout, config.activation_dropout, norm="none")
        self.ffn1_layer_norm = nn.LayerNorm(dim)
        self.conv_scale: nn.Module = ScaleBias(dim)
        self.conv_module = ConvolutionModule(dim, config.depthwise_conv_kernel_size, dropout, config.causal)
        self.conv_layer_norm = nn.LayerNorm(dim)
        self.ffn2_scale: nn.Module = ScaleBias(dim)
        self.ffn2 = ConformerFeedForward(dim, inner, dropout, config.activation_dropout, norm="none")
        self.ffn2_layer_norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:  # (B, T, D)
        scaled = self.self_attn_scale(x)
        if frames.positions is None:
            mixed = self.self_attn(scaled, frames.attend, frames.chunks)
        else:
            mixed = self.self_attn(scaled, frames.positions, frames.attend, frames.chunks)
        x = self.self_attn_layer_norm(x + self.dropout(mixed))
        x = self.ffn1_layer_norm(x + self.ffn1(self.ffn1_scale(x)))
        x = self.conv_layer_norm(x + self.conv_module(self.conv_scale(x), frames.valid, frames.chunks))
        return self.ffn2_layer_norm(x + self.ffn2(self.ffn2_scale(x)))  # type: ignore[no-any-return]

    def fold(self) -> SqueezeformerBlock:
        """Fold the scales and biases into the linear layers after them."""
        self.self_attn_scale = _fold_scale(self.self_attn_scale, *self.self_attn.projections())
        self.ffn1_scale = _fold_scale(self.ffn1_scale, self.ffn1.w_1)
        self.conv_scale = _fold_scale(self.conv_scale, self.conv_module.pointwise_conv1)
        self.ffn2_scale = _fold_scale(self.ffn2_scale, self.ffn2.w_1)
        return self


class TimeReduction(nn.Module):
    """Depthwise convolution with stride 2, pointwise: (B, T, D) -> (B, ceil(T / 2), D) (Squeezeformer, section 3.1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise_conv = DepthwiseConv(dim, REDUCTION_KERNEL, stride=2)
        self.pointwise_conv = Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, valid: Tensor | None, chunks: Chunks | None = None) -> Tensor:
        if valid is not None:  # the kernel sees up to four frames after the last valid one
            x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
        return self.pointwise_conv(self.depthwise_conv(x, chunks))  # type: ignore[no-any-return]


def _preset(layers: int, dim: int, heads: int, reduce: int, recover: int, **keys: object) -> dict[str, object]:
    return {**published_size(layers, dim, heads), "time_reduce_idx": reduce, "time_recover_idx": recover, **keys}


@register_encoder(
    "squeezeformer",
    config=SqueezeformerConfig,
    presets={
        # table 2 of the paper; pre-training keys as in HuBERT-base
        "squeezeformer-xs": _preset(16, 144, 4, 7, 15),
        "squeezeformer-s": _preset(18, 196, 4, 8, 17, conv_pos_groups=14),  # 16 divides neither 196 nor 324
        "squeezeformer-sm": _preset(16, 256, 4, 7, 15),
        "squeezeformer-m": _preset(20, 324, 4, 9, 19, conv_pos_groups=18),
        "squeezeformer-ml": _preset(18, 512, 8, 8, 17),
        "squeezeformer-l": _preset(22, 640, 8, 10, 21),
        # the model that Table 1 of the main paper counts: the same U-Net around fairseq's Conformer blocks at their defaults
        "squeezeformer-xs-table1": _preset(
            16, 144, 4, 7, 15, encoder_ffn_embed_dim=3072, pos_enc_type="abs", layer_type="conformer", required_seq_len_multiple=2
        ),
        "squeezeformer-debug": {
            **DEBUG,
            "encoder_layers": 4,
            "time_reduce_idx": 1,
            "time_recover_idx": 3,
            "depthwise_conv_kernel_size": 15,
        },
    },
)
class SqueezeformerEncoder(Encoder):
    """Runs blocks at 20 ms, at 40 ms between `time_reduce_idx` and `time_recover_idx`, and at 20 ms again.

    The input to the first block is LayerNorm(sqrt(D) (x + positional convolution of x)).
    """

    chunk_multiple = 2  # frames of 20 ms per frame at half rate
    relative: bool

    def __init__(self, config: HubertConfig) -> None:
        assert isinstance(config, SqueezeformerConfig)
        self.relative = config.pos_enc_type == "rel_pos"
        self.reduce, self.recover = config.time_reduce_idx, config.time_recover_idx
        super().__init__(config)
        self.time_reduction = TimeReduction(config.encoder_embed_dim)
        self.time_recovery = Linear(config.encoder_embed_dim, config.encoder_embed_dim)

    def build_block(self, config: HubertConfig, index: int) -> nn.Module:
        assert isinstance(config, SqueezeformerConfig)
        if config.layer_type == "squeezeformer":
            return SqueezeformerBlock(config)
        shared = {key.name for key in dataclasses.fields(ConformerConfig)} & {key.name for key in dataclasses.fields(config)}
        return ConformerBlock(ConformerConfig(**{key: getattr(config, key) for key in shared}))

    def build_norm(self, config: HubertConfig) -> nn.Module:
        """LayerNorm of sqrt(D) x; the factor only makes eps smaller."""
        return nn.LayerNorm(config.encoder_embed_dim, eps=1e-5 / config.encoder_embed_dim)

    def init_weights(self) -> None:
        """Leave weights and biases as `nn.Linear` and `DepthwiseConv` draw them: uniform in +-fan_in^-1/2, as the authors do."""

    def kinds(self) -> Mapping[str, Kind]:
        return {**super().kinds(), "time_reduction": Kind(RATE_CHANGE), "time_recovery": Kind(RATE_CHANGE)}

    @property
    def block_rates(self) -> list[int]:
        return [2 if self.reduce <= index < self.recover else 1 for index in range(len(self.layers))]

    def positions(self, x: Tensor, keys: int) -> Tensor | None:
        return relative_sinusoids(keys, x.size(2), x) if self.relative else None

    def run_blocks(self, x: Tensor, frames: Frames, kept: list[bool]) -> list[Tensor]:
        length, full, saved = x.size(1), frames, x
        states = [x]
        reduced = False
        for index, keep in enumerate(kept):
            if index == self.reduce:
                reduced, saved = True, x
                x = self.time_reduction(x, full.valid, full.chunks)  # (B, ceil(T / 2), D)
                halved = None if full.chunks is None else full.chunks.at_rate(2)
                frames = self.frames(x, None if full.valid is None else every(full.valid, 2), halved)
            elif index == self.recover:
                reduced, frames = False, full
                x = self.time_recovery(repeated(x, 2, length)) + saved
            if keep:
                x = self.run_block(self.layers[index], x, frames)
            states.append(repeated(x, 2, length) if reduced else x)
        return states
