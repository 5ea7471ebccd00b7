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
from ..layers.activation import silu, swoosh_r
from ..layers.chunks import Chunks
from ..layers.norm import norm_of
from ..layers.position import repeated
from ..layers.scaling import Balancer, BiasNorm, Schedule, Scheduled, Whitener, chance
from ..layers.tracing import every
from ..layers.zipformer import (
    AttentionWeights,
    Bypass,
    ConvolutionModule,
    FeedForward,
    NoBypass,
    NonlinearAttention,
    NormFirst,
    RateChange,
    SelfAttention,
    compact_positions,
    fitted,
    leave_out,
    skipped,
    whitener,
)
from .base import DEBUG, HUBERT_BASE, Encoder, Frames
from .registry import register_encoder


class Stack(NamedTuple):
    """The configuration of one stack."""

    layers: int
    dim: int
    ffn_dim: int
    heads: int
    kernel: int
    rate: int


STACK_KEYS = {  # key -> (field of `Stack`, fairseq's key that must agree with it, how they must agree)
    "zipformer_layers": ("layers", "encoder_layers", "sum"),
    "zipformer_dims": ("dim", "encoder_embed_dim", "maximum"),
    "zipformer_ffn_dims": ("ffn_dim", "encoder_ffn_embed_dim", "maximum"),
    "zipformer_heads": ("heads", "encoder_attention_heads", "maximum"),
    "zipformer_kernels": ("kernel", "", ""),
    "zipformer_rates": ("rate", "", ""),
}


@dataclass
class ZipformerConfig(HubertConfig):
    """A Zipformer HuBERT; the defaults are the sizes of Zipformer-S. Keys with several numbers have one per stack."""

    encoder_layers: int = option(12, "number of blocks, the sum of zipformer_layers", bounds=Bounds(1, MOST_LAYERS))
    encoder_embed_dim: int = option(256, "model dimension D, the maximum of zipformer_dims", bounds=COUNT)
    encoder_ffn_embed_dim: int = option(768, "inner dimension of the feed-forward modules, the maximum of zipformer_ffn_dims", bounds=COUNT)
    encoder_attention_heads: int = option(8, "number of attention heads, the maximum of zipformer_heads", bounds=COUNT)
    zipformer_layers: str = option("2,2,2,2,2,2", "number of blocks of each stack")
    zipformer_dims: str = option("192,256,256,256,256,256", "model dimension of each stack; multiples of 4")
    zipformer_ffn_dims: str = option(
        "512,768,768,768,768,768", "inner dimension of the second of three feed-forward modules; the first has 3/4 and the third 5/4 of it"
    )
    zipformer_heads: str = option("4,4,4,8,4,4", "attention heads of each stack")
    zipformer_kernels: str = option("31,31,15,15,15,31", "kernel of the depthwise convolutions of each stack, in frames of that stack; odd")
    zipformer_rates: str = option("1,2,4,8,4,2", "frames of 20 ms per frame of each stack")
    zipformer_query_dim: int = option(32, "dimension of a head's queries and keys", bounds=COUNT)
    zipformer_value_dim: int = option(12, "dimension of a head's values", bounds=COUNT)
    zipformer_position_dim: int = option(4, "dimension of a head's positional queries", bounds=COUNT)
    zipformer_table_dim: int = option(48, "dimension of the table of relative positions; even", bounds=COUNT)

    # parts that the paper's ablations remove or replace (its tables 5 and 6)
    zipformer_block: str = option(
        "zipformer", "type of the blocks: the paper's, or two Conformer blocks for each", ("zipformer", "conformer")
    )
    zipformer_nonlinear_attention: bool = option(True, "use nonlinear attention in every block")
    zipformer_share_weights: bool = option(True, "compute attention weights once per block; false: again for the second self-attention")
    zipformer_bypass: bool = option(True, "use a bypass in the middle and at the end of every block; bypasses of whole stacks always stay")
    zipformer_norm: str = option("bias_norm", "norm of every block and before the first block", ("bias_norm", "layer_norm"))
    zipformer_activation: str = option(
        "swoosh", "SwooshL in feed-forward and SwooshR in convolution modules, or one function in both", ("swoosh", "swoosh_r", "swish")
    )
    zipformer_module_norm: bool = option(False, "add a norm before every module of a block, for optimizers that do not learn scales (Adam)")
    zipformer_balancer: bool = option(True, "use Balancers, which keep activations in range through gradients in training")
    zipformer_whitener: bool = option(True, "use Whiteners, which keep activations decorrelated through gradients in training")

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
                "compile_blocks=true: a Zipformer's blocks draw in every batch what acts on their gradients, which breaks compiled code "
                "into pieces; set it to false"
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
        self._check_ablations()
        super().validate()

    def _check_ablations(self) -> None:
        for key in ("zipformer_nonlinear_attention", "zipformer_share_weights"):
            if self.zipformer_block == "conformer" and not getattr(self, key):
                raise UserError(
                    f"{key}=false contradicts zipformer_block=conformer, whose blocks have no nonlinear attention and one self-attention "
                    "each: leave it true, or set zipformer_block=zipformer"
                )
        if self.zipformer_nonlinear_attention and not self.zipformer_share_weights:
            raise UserError(
                "zipformer_share_weights=false contradicts zipformer_nonlinear_attention=true, which has no weights of its own: set "
                "zipformer_nonlinear_attention=false, as the paper does"
            )


def _integers(key: str, text: str) -> tuple[int, ...]:
    try:
        if not all(part.strip().isascii() and part.strip().isdigit() for part in text.split(",")):
            raise ValueError(text)
        return read_numbers(key, text)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{key}={short(repr(text))} must be whole numbers joined by commas, one per stack, such as '2,2,2'") from error


# shares of the sequences that skip a module
ATTENTION_SKIP = CONVOLUTION_SKIP = Schedule(((0, 0.2), (4_000, 0.05), (16_000, 0.0)))
FEED_FORWARD_SKIP = Schedule(((0, 0.1), (4_000, 0.01), (50_000, 0.0)))


def attention_weights(config: ZipformerConfig, stack: Stack) -> AttentionWeights:
    """Build the attention weights of a block."""
    return AttentionWeights(
        stack.dim, stack.heads, config.zipformer_query_dim, config.zipformer_position_dim, config.zipformer_table_dim,
        config.attention_dropout,
    )  # fmt: skip


def feed_forward(config: ZipformerConfig, stack: Stack, quarters: int) -> FeedForward:
    """Build a feed-forward module of so many quarters of the stack's inner dimension."""
    return FeedForward(stack.dim, quarters * stack.ffn_dim // 4, config.dropout, config.activation_dropout)


def block_norm(config: ZipformerConfig, dim: int) -> nn.Module:
    """Build the norm that `zipformer_norm` names."""
    return BiasNorm(dim) if config.zipformer_norm == "bias_norm" else norm_of("layer_norm", dim)


def ablate(block: nn.Module, config: ZipformerConfig, modules: tuple[str, ...], dim: int) -> None:
    """Replace or remove parts of all modules of a block as the config says; `modules`: those that read the residual sum."""
    if not config.zipformer_balancer:
        leave_out(block, Balancer)
    if not config.zipformer_whitener:
        leave_out(block, Whitener)
    if config.zipformer_activation != "swoosh":
        for module in block.modules():
            if isinstance(module, (FeedForward, ConvolutionModule)):
                module.activation = swoosh_r if config.zipformer_activation == "swoosh_r" else silu
    if config.zipformer_module_norm:
        for name in modules:
            if getattr(block, name) is not None:
                setattr(block, name, NormFirst(block_norm(config, dim), getattr(block, name)))


def keys_seen(x: Tensor, frames: Frames) -> Tensor | None:
    """The visible keys: (B, 1, T), or (B, T, T) in chunks; None = all."""
    seen = None if frames.attend is None else frames.attend[:, 0]
    if seen is not None and seen.size(1) > 1:
        seen = seen.expand(len(x), -1, -1) if frames.valid is None else seen & frames.valid.unsqueeze(2)
    return seen


class ZipformerBlock(Scheduled):
    """One block (figure 2, left); the parts that are skipped or made uniform early in training are drawn for every batch.

    x0 -> attention weights; x0 + FF1 + NLA + SA1 + Conv1 + FF2, bypass, + SA2 + Conv2 + FF3, BiasNorm, bypass from x0.
    """

    MODULES = (
        "self_attn_weights", "self_attn_weights2", "self_attn1", "self_attn2", "feed_forward1", "feed_forward2", "feed_forward3",
        "nonlin_attention", "conv_module1", "conv_module2",
    )  # fmt: skip
    # share of the batches in which the nonlinear attention weights all frames equally
    UNIFORM = Schedule(((0, 0.25), (4_000, 0.025)), unset=0.0)

    def __init__(self, config: ZipformerConfig, stack: Stack, skip: Schedule) -> None:
        super().__init__()
        dim = stack.dim
        self.self_attn_weights = attention_weights(config, stack)
        self.self_attn1 = SelfAttention(dim, stack.heads, config.zipformer_value_dim)
        self.self_attn2 = SelfAttention(dim, stack.heads, config.zipformer_value_dim)
        self.feed_forward1, self.feed_forward2, self.feed_forward3 = (feed_forward(config, stack, quarters) for quarters in (3, 4, 5))
        self.nonlin_attention = NonlinearAttention(dim) if config.zipformer_nonlinear_attention else None
        self.conv_module1 = ConvolutionModule(dim, stack.kernel, config.causal)
        self.conv_module2 = ConvolutionModule(dim, stack.kernel, config.causal)
        self.bypass_mid = Bypass(dim) if config.zipformer_bypass else NoBypass()
        self.norm = block_norm(config, dim)
        self.bypass = Bypass(dim, skip) if config.zipformer_bypass else NoBypass()
        self.balancer1 = Balancer((0.45, 0.55), (0.2, 4.0))
        self.balancer2 = Balancer((0.45, 0.55), (0.1, 4.0))
        rare = 0.05
        self.balancer_na = Balancer((0.3, 0.7), (Schedule(((0, 0.004), (4_000, 0.02))), 100.0), rare)
        self.balancer_ff2 = Balancer((0.3, 0.7), (Schedule(((0, 0.0), (4_000, 0.1))), 2.0), rare)
        self.balancer_ff3 = Balancer((0.3, 0.7), (Schedule(((0, 0.0), (4_000, 0.2))), 4.0), rare)
        self.whiten = whitener(4.0, growth=3.0)
        self.self_attn_weights2 = None if config.zipformer_share_weights else attention_weights(config, stack)
        ablate(self, config, self.MODULES, dim)

    def forward(self, before: Tensor, frames: Frames) -> Tensor:  # (B, T, C)
        valid, chunks, x = frames.valid, frames.chunks, before
        seen = keys_seen(x, frames)
        convolution = self.now(CONVOLUTION_SKIP) if self.training else 0.0
        feed_forward = self.now(FEED_FORWARD_SKIP) if self.training else 0.0
        uniform = self.training and self.nonlin_attention is not None and chance(self.now(self.UNIFORM))
        # a sequence skips all three users of the attention weights, or none
        attended = skipped(x.new_ones(x.size(0), 1, 1), self.now(ATTENTION_SKIP)) if self.training else None

        assert frames.positions is not None
        weights = self.self_attn_weights(x, frames.positions, valid, seen, chunks)
        x = x + self.feed_forward1(x, valid)
        if self.nonlin_attention is not None:
            x = _added(x, self.balancer_na(self.nonlin_attention(x, weights, valid, seen, uniform, chunks), valid), attended)
        x = _added(x, self.self_attn1(x, weights, valid, chunks), attended)
        x = x + skipped(self.conv_module1(x, valid, chunks), convolution)
        x = x + skipped(self.balancer_ff2(self.feed_forward2(x, valid), valid), feed_forward)
        x = self.bypass_mid(before, x)
        if self.self_attn_weights2 is not None:
            weights = self.self_attn_weights2(x, frames.positions, valid, seen, chunks)
        x = _added(x, self.self_attn2(x, weights, valid, chunks), attended)
        x = x + skipped(self.conv_module2(x, valid, chunks), convolution)
        x = x + skipped(self.balancer_ff3(self.feed_forward3(x, valid), valid), feed_forward)
        x = self.norm(self.balancer1(x, valid))
        x = self.bypass(before, x)
        return self.whiten(self.balancer2(x, valid), valid)  # type: ignore[no-any-return]


class ConformerStyleBlock(Scheduled):
    """A Conformer block (Gulati et al. 2020, equation 1) of Zipformer's modules: half a feed-forward module, self-attention with its own
    weights, convolution, half a feed-forward module, norm, bypass."""

    MODULES = ("self_attn_weights", "self_attn", "feed_forward1", "feed_forward2", "conv_module")

    def __init__(self, config: ZipformerConfig, stack: Stack, skip: Schedule) -> None:
        super().__init__()
        dim = stack.dim
        self.feed_forward1, self.feed_forward2 = (feed_forward(config, stack, 4) for _ in range(2))
        self.self_attn_weights = attention_weights(config, stack)
        self.self_attn = SelfAttention(dim, stack.heads, config.zipformer_value_dim)
        self.conv_module = ConvolutionModule(dim, stack.kernel, config.causal)
        self.norm = block_norm(config, dim)
        self.bypass = Bypass(dim, skip) if config.zipformer_bypass else NoBypass()
        self.balancer1 = Balancer((0.45, 0.55), (0.2, 4.0))
        self.balancer2 = Balancer((0.45, 0.55), (0.1, 4.0))
        self.whiten = whitener(4.0, growth=3.0)
        ablate(self, config, self.MODULES, dim)

    def forward(self, before: Tensor, frames: Frames) -> Tensor:  # (B, T, C)
        valid, chunks = frames.valid, frames.chunks
        skips = ATTENTION_SKIP, CONVOLUTION_SKIP, FEED_FORWARD_SKIP
        attention, convolution, last = (self.now(skip) if self.training else 0.0 for skip in skips)
        assert frames.positions is not None
        x = torch.add(before, self.feed_forward1(before, valid), alpha=0.5)
        weights = self.self_attn_weights(x, frames.positions, valid, keys_seen(x, frames), chunks)
        x = x + skipped(self.self_attn(x, weights, valid, chunks), attention)
        x = x + skipped(self.conv_module(x, valid, chunks), convolution)
        x = torch.add(x, skipped(self.feed_forward2(x, valid), last), alpha=0.5)
        x = self.bypass(before, self.norm(self.balancer1(x, valid)))
        return self.whiten(self.balancer2(x, valid), valid)  # type: ignore[no-any-return]


class ConformerPair(nn.Module):
    """Two `ConformerStyleBlock`s instead of one `ZipformerBlock`, which has about as many modules as two Conformer blocks."""

    def __init__(self, config: ZipformerConfig, stack: Stack, skip: Schedule) -> None:
        super().__init__()
        self.first, self.second = (ConformerStyleBlock(config, stack, skip) for _ in range(2))

    def forward(self, x: Tensor, frames: Frames) -> Tensor:  # (B, T, C)
        return self.second(self.first(x, frames), frames)  # type: ignore[no-any-return]


BLOCKS = {"zipformer": ZipformerBlock, "conformer": ConformerPair}


def _added(x: Tensor, y: Tensor, factor: Tensor | None) -> Tensor:
    return x + y if factor is None else torch.addcmul(x, y, factor)


def block_skip(config: ZipformerConfig, index: int) -> Schedule:
    """Share of sequences that skip block `index`: it falls from 0.5 over its part of the first 4,000 updates, first in the first blocks."""
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
        # without temporal downsampling (table 5); the paper runs it at 25 Hz
        "zipformer-m-flat": {
            **ZIPFORMER,
            "encoder_layers": 12,
            "encoder_embed_dim": 512,
            "encoder_ffn_embed_dim": 1536,
            "zipformer_layers": "12",
            "zipformer_dims": "512",
            "zipformer_ffn_dims": "1536",
            "zipformer_heads": "8",
            "zipformer_kernels": "31",
            "zipformer_rates": "1",
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
    """Runs stacks of `ZipformerBlock` at their own rates and widths.

    It computes x + positional convolution, BiasNorm (instead of LayerNorm), and the stacks. Between stacks, channels are cut or padded with
    zeros. States and output are D wide: channels that a stack lacks come from the most recent wider stack, or are zero if there is none.
    The state of a block at a reduced rate repeats its frames; the last state of a stack is the stack's output, after its bypass.

    Early in training, modules and blocks are skipped at rates that fall with the number of updates (`set_num_updates`; without it an
    encoder is trained as at the end of these schedules). All draws use torch's generator, and the parameters of a skipped part get
    gradients of zero, so data-parallel processes may draw differently.
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
        return BLOCKS[config.zipformer_block](config, of_block[index], block_skip(config, index))

    def build_norm(self, config: HubertConfig) -> nn.Module:
        assert isinstance(config, ZipformerConfig)
        return block_norm(config, config.encoder_embed_dim if config.layer_norm_first else config.input_dim)

    @property
    def block_rates(self) -> list[int]:
        return [stack.rate for stack in self.shapes for _ in range(stack.layers)]

    def init_weights(self) -> None:
        """Do nothing: blocks are initialized when they are built, and ScaledAdam relies on their scales."""

    def set_num_updates(self, num_updates: int) -> None:
        super().set_num_updates(num_updates)
        for module in self.modules():
            if isinstance(module, Scheduled):
                module.update = num_updates

    def _run(self, x: Tensor, padding_mask: Tensor | None, depth: int, layerdrop: float, chunks: Chunks | None = None) -> list[Tensor]:
        # features of D channels are accepted too, and cut as between stacks
        return super()._run(x[..., : self.shapes[0].dim], padding_mask, depth, layerdrop, chunks)

    def positions(self, x: Tensor, keys: int) -> Tensor | None:
        return compact_positions(keys, self.table_dim, x)

    def run_blocks(self, x: Tensor, frames: Frames, kept: list[bool]) -> list[Tensor]:
        """Run the blocks on x (B, T, input_dim); returns states 0 ... len(kept), each (B, T, D) at 20 ms."""
        states = [fitted(x, self.dim)]
        by_rate: dict[int, Frames] = {1: frames}
        for shape, change in zip(self.shapes, self.rate_changes, strict=True):
            assert isinstance(change, RateChange)
            x = before = fitted(x, shape.dim)
            if shape.rate not in by_rate:
                valid = None if frames.valid is None else every(frames.valid, shape.rate)
                chunks = None if frames.chunks is None else frames.chunks.at_rate(shape.rate)
                by_rate[shape.rate] = self.frames(every(x, shape.rate), valid, chunks)
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
