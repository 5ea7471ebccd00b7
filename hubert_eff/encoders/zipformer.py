"""Zipformer encoder (Yao et al. 2024): stacks of blocks at different frame rates and widths."""

# B batch, T frames, D widest model dim, C width of a stack

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import COUNT, MOST_LAYERS, Bounds, HubertConfig, option, read_numbers
from ..errors import UserError, short
from ..layers.chunks import Chunks
from ..layers.position import repeated
from ..layers.scaling import Balancer, BiasNorm, Schedule, Scheduled, chance
from ..layers.zipformer import (
    AttentionWeights,
    Bypass,
    ConvolutionModule,
    FeedForward,
    NonlinearAttention,
    RateChange,
    SelfAttention,
    compact_positions,
    fitted,
    skipped,
    whitener,
)
from .base import DEBUG, HUBERT_BASE, Encoder, Frames
from .registry import register_encoder


class Stack(NamedTuple):
    """What is configured per stack."""

    layers: int
    dim: int
    ffn_dim: int
    heads: int
    kernel: int
    rate: int


STACK_KEYS = {  # key -> (field of `Stack`, fairseq's key that must agree with it, and how)
    "zipformer_layers": ("layers", "encoder_layers", "sum"),
    "zipformer_dims": ("dim", "encoder_embed_dim", "maximum"),
    "zipformer_ffn_dims": ("ffn_dim", "encoder_ffn_embed_dim", "maximum"),
    "zipformer_heads": ("heads", "encoder_attention_heads", "maximum"),
    "zipformer_kernels": ("kernel", "", ""),
    "zipformer_rates": ("rate", "", ""),
}


@dataclass
class ZipformerConfig(HubertConfig):
    """A Zipformer HuBERT; the defaults are the sizes of Zipformer-S. Keys of several numbers have one per stack."""

    encoder_layers: int = option(12, "number of blocks: the sum of zipformer_layers", bounds=Bounds(1, MOST_LAYERS))
    encoder_embed_dim: int = option(256, "model dimension D: the maximum of zipformer_dims", bounds=COUNT)
    encoder_ffn_embed_dim: int = option(768, "the maximum of zipformer_ffn_dims", bounds=COUNT)
    encoder_attention_heads: int = option(8, "the maximum of zipformer_heads", bounds=COUNT)
    zipformer_layers: str = option("2,2,2,2,2,2", "blocks of each stack")
    zipformer_dims: str = option("192,256,256,256,256,256", "model dimension of each stack; multiples of 4")
    zipformer_ffn_dims: str = option(
        "512,768,768,768,768,768", "inner dimension of the second of three feed-forward modules; the others have 3/4 and 5/4 of it"
    )
    zipformer_heads: str = option("4,4,4,8,4,4", "attention heads of each stack")
    zipformer_kernels: str = option("31,31,15,15,15,31", "kernel of the depthwise convolutions of each stack, in its frames; odd")
    zipformer_rates: str = option("1,2,4,8,4,2", "frames of 20 ms per frame of each stack")
    zipformer_query_dim: int = option(32, "dimension of a head's queries and keys", bounds=COUNT)
    zipformer_value_dim: int = option(12, "dimension of a head's values", bounds=COUNT)
    zipformer_position_dim: int = option(4, "dimension of a head's positional queries", bounds=COUNT)
    zipformer_table_dim: int = option(48, "dimension of the table of relative positions; even", bounds=COUNT)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks, first to last. Raises `UserError` for a list that cannot be read, or lists of different lengths."""
        lists = {key: _integers(key, getattr(self, key)) for key in STACK_KEYS}
        count = len(lists["zipformer_layers"])
        for key, values in lists.items():
            if len(values) != count:
                raise UserError(f"{key}={getattr(self, key)!r} has {len(values)} numbers, but zipformer_layers has {count}: one per stack")
        return tuple(Stack(*values) for values in zip(*lists.values(), strict=True))

    @property
    def input_dim(self) -> int:
        """Width of the first stack."""
        return self.stacks[0].dim

    def validate(self) -> None:
        if self.compile_blocks:
            raise UserError(
                "compile_blocks=true: a Zipformer's blocks draw anew in every batch what acts on their gradients, which tears compiled "
                "code into pieces; set it to false"
            )
        stacks = self.stacks
        for key, (name, common, how) in STACK_KEYS.items():
            values = [getattr(stack, name) for stack in stacks]
            if min(values) < 1:
                raise UserError(f"{key}={getattr(self, key)!r}: every number must be at least 1")
            if how:
                right = sum(values) if how == "sum" else max(values)
                if getattr(self, common) != right:
                    raise UserError(f"{common}={getattr(self, common)} must be {right}, the {how} of {key}={getattr(self, key)!r}")
        for stack in stacks:
            if stack.kernel % 2 == 0:
                raise UserError(f"zipformer_kernels={self.zipformer_kernels!r}: {stack.kernel} must be odd")
            if stack.dim % 4 or stack.ffn_dim % 4:
                key, value = ("zipformer_dims", stack.dim) if stack.dim % 4 else ("zipformer_ffn_dims", stack.ffn_dim)
                raise UserError(f"{key}={getattr(self, key)!r}: {value} must be a multiple of 4")
        if self.zipformer_table_dim % 2:
            raise UserError(f"zipformer_table_dim={self.zipformer_table_dim} must be even: cosines and sines alternate")
        super().validate()


def _integers(key: str, text: str) -> tuple[int, ...]:
    try:
        if not all(part.strip().isascii() and part.strip().isdigit() for part in text.split(",")):
            raise ValueError(text)
        return read_numbers(key, text)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{key}={short(repr(text))} must be whole numbers joined by commas, one per stack, such as '2,2,2'") from error


class ZipformerBlock(Scheduled):
    """One block (figure 2, left); what is skipped or made uniform early in training is drawn anew for every batch.

    x0 -> attention weights; x0 + FF1 + NLA + SA1 + Conv1 + FF2, bypass, + SA2 + Conv2 + FF3, BiasNorm, bypass from x0.
    """

    # shares of the sequences that do without a module
    ATTENTION_SKIP = CONVOLUTION_SKIP = Schedule(((0, 0.2), (4_000, 0.05), (16_000, 0.0)))
    FEED_FORWARD_SKIP = Schedule(((0, 0.1), (4_000, 0.01), (50_000, 0.0)))
    # share of the batches in which the non-linear attention weighs all frames alike
    UNIFORM = Schedule(((0, 0.25), (4_000, 0.025)), unset=0.0)

    def __init__(self, config: ZipformerConfig, stack: Stack, skip: Schedule) -> None:
        super().__init__()
        dim = stack.dim
        self.self_attn_weights = AttentionWeights(
            dim, stack.heads, config.zipformer_query_dim, config.zipformer_position_dim, config.zipformer_table_dim,
            config.attention_dropout,
        )  # fmt: skip
        self.self_attn1 = SelfAttention(dim, stack.heads, config.zipformer_value_dim)
        self.self_attn2 = SelfAttention(dim, stack.heads, config.zipformer_value_dim)
        self.feed_forward1, self.feed_forward2, self.feed_forward3 = (
            FeedForward(dim, quarters * stack.ffn_dim // 4, config.dropout, config.activation_dropout) for quarters in (3, 4, 5)
        )
        self.nonlin_attention = NonlinearAttention(dim)
        self.conv_module1 = ConvolutionModule(dim, stack.kernel, config.causal)
        self.conv_module2 = ConvolutionModule(dim, stack.kernel, config.causal)
        self.bypass_mid = Bypass(dim)
        self.norm = BiasNorm(dim)
        self.bypass = Bypass(dim, skip)
        self.balancer1 = Balancer((0.45, 0.55), (0.2, 4.0))
        self.balancer2 = Balancer((0.45, 0.55), (0.1, 4.0))
        rare = 0.05
        self.balancer_na = Balancer((0.3, 0.7), (Schedule(((0, 0.004), (4_000, 0.02))), 100.0), rare)
        self.balancer_ff2 = Balancer((0.3, 0.7), (Schedule(((0, 0.0), (4_000, 0.1))), 2.0), rare)
        self.balancer_ff3 = Balancer((0.3, 0.7), (Schedule(((0, 0.0), (4_000, 0.2))), 4.0), rare)
        self.whiten = whitener(4.0, growth=3.0)

    def forward(self, before: Tensor, frames: Frames) -> Tensor:  # (B, T, C)
        valid, chunks, x = frames.valid, frames.chunks, before
        seen = None if frames.attend is None else frames.attend[:, 0]  # (B, 1, T), or (B, T, T) in chunks
        if seen is not None and seen.size(1) > 1:
            seen = seen.expand(len(x), -1, -1) if valid is None else seen & valid.unsqueeze(2)
        convolution = self.now(self.CONVOLUTION_SKIP) if self.training else 0.0
        feed_forward = self.now(self.FEED_FORWARD_SKIP) if self.training else 0.0
        uniform = self.training and chance(self.now(self.UNIFORM))
        # a sequence does without all three users of the attention weights, or without none
        attended = skipped(x.new_ones(x.size(0), 1, 1), self.now(self.ATTENTION_SKIP)) if self.training else None

        assert frames.positions is not None
        weights = self.self_attn_weights(x, frames.positions, valid, seen, chunks)
        x = x + self.feed_forward1(x, valid)
        x = _added(x, self.balancer_na(self.nonlin_attention(x, weights, valid, seen, uniform, chunks), valid), attended)
        x = _added(x, self.self_attn1(x, weights, valid, chunks), attended)
        x = x + skipped(self.conv_module1(x, valid, chunks), convolution)
        x = x + skipped(self.balancer_ff2(self.feed_forward2(x, valid), valid), feed_forward)
        x = self.bypass_mid(before, x)
        x = _added(x, self.self_attn2(x, weights, valid, chunks), attended)
        x = x + skipped(self.conv_module2(x, valid, chunks), convolution)
        x = x + skipped(self.balancer_ff3(self.feed_forward3(x, valid), valid), feed_forward)
        x = self.norm(self.balancer1(x, valid))
        x = self.bypass(before, x)
        return self.whiten(self.balancer2(x, valid), valid)  # type: ignore[no-any-return]


def _added(x: Tensor, y: Tensor, factor: Tensor | None) -> Tensor:
    return x + y if factor is None else torch.addcmul(x, y, factor)


def block_skip(config: ZipformerConfig, index: int) -> Schedule:
    """Share of sequences that do without block `index`: falls from 0.5 over its part of the first 4,000 updates, the first blocks first."""
    stacks = config.stacks
    place, within, stack = [(i, j, stack) for i, stack in enumerate(stacks) for j in range(stack.layers)][index]
    share = 4_000 / (len(stacks) + 1)
    begin = share * (place + 1 + within / stack.layers)
    return Schedule(((begin, 0.5), (begin + share / stack.layers, 0.035 * stack.rate**0.5)), unset=0.0)


ZIPFORMER = {
    **HUBERT_BASE,
    "attention_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "required_seq_len_multiple": 1,
}


@register_encoder(
    "zipformer",
    config=ZipformerConfig,
    presets={
        # table 1 of the paper, at 50 Hz; pre-training keys as in HuBERT-base
        "zipformer-s": ZIPFORMER,
        "zipformer-m": {
            **ZIPFORMER,
            "encoder_layers": 16,
            "encoder_embed_dim": 512,
            "encoder_ffn_embed_dim": 1536,
            "zipformer_layers": "2,2,3,4,3,2",
            "zipformer_dims": "192,256,384,512,384,256",
            "zipformer_ffn_dims": "512,768,1024,1536,1024,768",
        },
        "zipformer-l": {
            **ZIPFORMER,
            "encoder_layers": 19,
            "encoder_embed_dim": 768,
            "encoder_ffn_embed_dim": 2048,
            "zipformer_layers": "2,2,4,5,4,2",
            "zipformer_dims": "192,256,512,768,512,256",
            "zipformer_ffn_dims": "512,768,1536,2048,1536,768",
        },
        "zipformer-debug": {
            **DEBUG,
            "encoder_layers": 3,
            "encoder_attention_heads": 4,
            "attention_dropout": 0.0,
            "zipformer_layers": "1,1,1",
            "zipformer_dims": "48,64,48",
            "zipformer_ffn_dims": "96,128,96",
            "zipformer_heads": "2,4,2",
            "zipformer_kernels": "15,15,7",
            "zipformer_rates": "1,2,4",
            "zipformer_query_dim": 16,
            "zipformer_value_dim": 8,
            "zipformer_table_dim": 24,
        },
    },
)
class ZipformerEncoder(Encoder):
    """Stacks of `ZipformerBlock` at their own rates and widths.

    x + positional convolution, BiasNorm (in the place of LayerNorm), stacks. Between stacks channels are cut or added as zeros. States and
    output are D wide: channels that a stack lacks are those of the most recent wider one, zero where there is none. The state of
    a block at a reduced rate repeats its frames; the last one of a stack is the stack's output, after its bypass.

    Early in training modules and blocks are skipped at rates that fall with the number of updates (`set_num_updates`; an encoder
    that was never told one is trained as at the end of these schedules). All draws are torch's, and whatever is skipped leaves its
    parameters a gradient of zeros, so data-parallel processes need not draw the same.
    """

    def __init__(self, config: ZipformerConfig) -> None:
        super().__init__(config)
        self.dim = config.encoder_embed_dim
        self.table_dim = config.zipformer_table_dim
        self.shapes = config.stacks
        self.chunk_multiple = math.lcm(*(stack.rate for stack in self.shapes))
        self.rate_changes = nn.ModuleList([RateChange(stack.dim, stack.rate) for stack in self.shapes])

    def build_block(self, config: HubertConfig, index: int) -> nn.Module:
        assert isinstance(config, ZipformerConfig)
        of_block = [stack for stack in config.stacks for _ in range(stack.layers)]
        return ZipformerBlock(config, of_block[index], block_skip(config, index))

    def build_norm(self, config: HubertConfig) -> nn.Module:
        return BiasNorm(config.encoder_embed_dim if config.layer_norm_first else config.input_dim)

    @property
    def block_rates(self) -> list[int]:
        return [stack.rate for stack in self.shapes for _ in range(stack.layers)]

    def init_weights(self) -> None:
        """Blocks are initialized as they are built: ScaledAdam relies on their scales, BERT's would undo them."""

    def set_num_updates(self, num_updates: int) -> None:
        super().set_num_updates(num_updates)
        for module in self.modules():
            if isinstance(module, Scheduled):
                module.update = num_updates

    def _run(self, x: Tensor, padding_mask: Tensor | None, depth: int, layerdrop: float, chunks: Chunks | None = None) -> list[Tensor]:
        # features of D channels are accepted as well, and cut as between stacks
        return super()._run(x[..., : self.shapes[0].dim], padding_mask, depth, layerdrop, chunks)

    def positions(self, x: Tensor, keys: int) -> Tensor | None:
        return compact_positions(keys, self.table_dim, x)

    def run_blocks(self, x: Tensor, frames: Frames, kept: list[bool]) -> list[Tensor]:
        """States 0 ... len(kept), each (B, T, D) at 20 ms; x (B, T, input_dim)."""
        states = [fitted(x, self.dim)]
        by_rate: dict[int, Frames] = {1: frames}
        for shape, change in zip(self.shapes, self.rate_changes, strict=True):
            assert isinstance(change, RateChange)
            x = before = fitted(x, shape.dim)
            if shape.rate not in by_rate:
                valid = None if frames.valid is None else frames.valid[:, :: shape.rate]
                chunks = None if frames.chunks is None else frames.chunks.at_rate(shape.rate)
                by_rate[shape.rate] = self.frames(x[:, :: shape.rate], valid, chunks)
            x = change.down(x, frames.valid)
            for place in range(shape.layers):
                index = len(states) - 1
                if index == len(kept):
                    return states
                if kept[index]:
                    x = self.run_block(self.layers[index], x, by_rate[shape.rate])
                if place == shape.layers - 1:
                    x = seen = change.up(x, before)
                else:
                    seen = repeated(x, shape.rate, before.size(1))
                states.append(torch.cat((seen, states[-1][..., shape.dim :]), dim=-1))
        return states
