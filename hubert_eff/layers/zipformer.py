"""The modules of a Zipformer block, and the changes of rate between its stacks (Yao et al. 2024)."""

# B batch, T frames, C channels, H heads, d query head dim, e position head dim, c value head dim

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .activation import swoosh_l, swoosh_r
from .chunks import Chunks
from .convolution import DepthwiseConv
from .dropout import Dropout
from .kinds import DEPTHWISE, FEED_FORWARD, POINTWISE, POSITION_PROJECTION, PRODUCT, PROJECTION, Kind, head_shapes
from .linear import Linear
from .norm import NoNorm
from .position import repeated
from .precision import wide
from .scaling import LIMIT_RATE, Balancer, Schedule, Scheduled, Whitener, chance, limit_parameter
from .tracing import is_exporting, is_tracing
from .zipformer_attention import RelativeWeights


def scaled_linear(inputs: int, outputs: int, scale: float, bias: bool = True) -> Linear:
    """A linear layer whose weight starts at torch's default times `scale`, and whose bias is uniform within 0.1 `scale`."""
    layer = Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight *= scale
    if bias:
        nn.init.uniform_(layer.bias, -0.1 * scale, 0.1 * scale)
    return layer


def whitener(limit: float, scale: float = 0.01, growth: float = 2.0, groups: int = 1) -> Whitener:
    """A whitener whose limit grows by the factor `growth` over the first 20,000 updates."""
    return Whitener(Schedule(((0, limit), (20_000, growth * limit))), scale, groups)


def compact_positions(frames: int, dim: int, like: Tensor) -> Tensor:
    """Positional table of the offsets -(T-1) .. T-1, (2T - 1, dim), in the dtype and on the device of `like`.

    Offsets beyond sqrt(dim) frames are compressed to a logarithm, and an arc tangent maps them to a circle. Cosines and sines fill the
    channels in turn; the last channel is 1. This is finer near 0 than sinusoids of the offset. The paper does not describe this table; it
    is that of the authors' code.
    """
    x = torch.arange(1 - frames, frames, device=like.device, dtype=torch.float32)
    start = math.sqrt(dim)
    compressed = start * x.sign() * ((x.abs() + start) / start).log()
    angles = (2.0 * math.pi / dim * compressed).atan()[:, None] * torch.arange(1, dim // 2 + 1, device=like.device)
    table = torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(1)[:, : dim - 1]
    return torch.nn.functional.pad(table, (0, 1), value=1.0).to(like.dtype)


class Weights(Protocol):
    """Attention weights for several modules: `RelativeWeights`, or their binarized form, which quantizes values first."""

    def mix(self, values: Any) -> Tensor:
        """Sum values over time with the weights."""


class AttentionWeights(Scheduled):
    """Computes weights for all modules of a block from queries, keys and position queries of one projection."""

    POSITION_SKIP = Schedule(((0, 0.5), (4_000, 0.0)))  # share of the batches without positions in the scores
    PENALTY_RATE = 0.1  # share of the batches in which scores beyond the limit are penalized

    def __init__(self, dim: int, heads: int, query_dim: int, position_dim: int, table_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.query_dim, self.position_dim = heads, query_dim, position_dim
        self.in_proj = scaled_linear(dim, heads * (2 * query_dim + position_dim), query_dim**-0.25)
        self.linear_pos = scaled_linear(table_dim, heads * position_dim, 0.05, bias=False)
        self.balance_keys = Balancer((0.4, 0.6), (0.0, 100.0), rate=0.025)
        self.whiten_keys = whitener(3.0, scale=0.025, groups=heads)
        self.dropout = Dropout(dropout)
        self.products: nn.Module | None = None  # replaces `RelativeWeights` once binarized

    def kinds(self) -> Mapping[str, Kind]:
        """Declare the kinds of the parts (`layers.kinds.Declared`)."""
        position = self.in_proj.out_features // self.heads - 2 * self.query_dim
        shapes = {**head_shapes(self.heads, self.query_dim, "query", "key"), **head_shapes(self.heads, position, "position")}
        queries = self.heads * self.query_dim
        sources = {"query": ("in_proj", 0), "key": ("in_proj", queries), "position": ("in_proj", 2 * queries)}
        return {
            "in_proj": Kind(PROJECTION),
            "products": Kind(PRODUCT, form="weights", shapes=shapes, sources=sources),
            "linear_pos": Kind(POSITION_PROJECTION),
        }

    def forward(
        self, x: Tensor, positions: Tensor, valid: Tensor | None = None, seen: Tensor | None = None, chunks: Chunks | None = None
    ) -> Weights:
        """Compute weights from x (B, T, C) and positions (2T - 1, table_dim), T the number of keys.

        valid (B, T) bool: frames that are not padding; seen (B, 1, T) bool, or (B, T, T) in chunks: visible keys.
        """
        queries = self.heads * self.query_dim
        q, k, p = self.in_proj(x).split((queries, queries, self.heads * self.position_dim), dim=-1)
        k = self.whiten_keys(self.balance_keys(k, valid), valid)
        q, k, p = (t.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for t in (q, k, p))
        keys = (positions.size(0) + 1) // 2
        offsets = self._offsets(positions) if chunks is None else chunks.table(self, keys, lambda: self._offsets(positions))
        if self.training and chance(self.now(self.POSITION_SKIP)):
            offsets = offsets * 0.0  # keeps a gradient of the parameters, which data-parallel training needs
        if self.products is not None:
            dropout = self.dropout.p if self.training else 0.0
            return self.products(q, k, p, offsets, seen, dropout, chunks)  # type: ignore[no-any-return]
        if chunks is not None:
            (k,) = chunks.with_kept(self, k)
        return RelativeWeights(q, k, p, offsets, seen, self.dropout, self.training and chance(self.PENALTY_RATE))

    def _offsets(self, positions: Tensor) -> Tensor:
        return self.linear_pos(positions).view(-1, self.heads, self.position_dim).transpose(0, 1)  # type: ignore[no-any-return]  # (H, 2T - 1, e)


class SelfAttention(nn.Module):
    """Mixes values by given weights; (B, T, C) -> (B, T, C)."""

    def __init__(self, dim: int, heads: int, value_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = Linear(dim, heads * value_dim)
        self.out_proj = scaled_linear(heads * value_dim, dim, 0.05)
        self.whiten = whitener(7.5, growth=3.0)
        self.mixer: nn.Module | None = None  # in place of `weights.mix`, once binarized

    def kinds(self) -> Mapping[str, Kind]:
        """Declare the kinds of the parts (`layers.kinds.Declared`)."""
        shapes = head_shapes(self.heads, self.in_proj.out_features // self.heads, "value")
        mixer = Kind(PRODUCT, form="mix", shapes=shapes, sources={"value": ("in_proj", 0)})
        return {"in_proj": Kind(PROJECTION), "mixer": mixer, "out_proj": Kind(PROJECTION)}

    def forward(self, x: Tensor, weights: Weights, valid: Tensor | None = None, chunks: Chunks | None = None) -> Tensor:
        values = self.in_proj(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # (B, H, T, c)
        if self.mixer is not None:
            mixed = self.mixer(values, weights, chunks)
        else:
            mixed = weights.mix(values if chunks is None else chunks.with_kept(self, values)[0])
        return self.whiten(self.out_proj(mixed.transpose(1, 2).flatten(2)), valid)  # type: ignore[no-any-return]


class NonlinearAttention(nn.Module):
    """out(A (v tanh s) * y) with the weights A of one head; s, v, y of 3/4 C channels (section 3.2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = 3 * dim // 4
        self.in_proj = Linear(dim, 3 * inner)
        self.out_proj = scaled_linear(inner, dim, 0.05)
        self.balancer = Balancer((Schedule(((0, 0.25), (20_000, 0.05))), Schedule(((0, 0.75), (20_000, 0.95)))), (0.5, 5.0))
        self.whiten1 = whitener(5.0)
        self.whiten2 = whitener(5.0, growth=3.0)
        self.mixer: nn.Module | None = None  # in place of `weights.mix`, once binarized

    def kinds(self) -> Mapping[str, Kind]:
        """Declare the kinds of the parts (`layers.kinds.Declared`)."""
        mixer = Kind(PRODUCT, form="mix", shapes=head_shapes(1, self.out_proj.in_features, "value"))
        return {"in_proj": Kind(PROJECTION), "mixer": mixer, "out_proj": Kind(PROJECTION)}

    def forward(
        self, x: Tensor, weights: Weights, valid: Tensor | None = None, seen: Tensor | None = None, uniform: bool = False,
        chunks: Chunks | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend. `uniform`: weight all visible keys equally instead of by `weights`; a binarized form does not have this."""
        s, v, y = self.in_proj(x).chunk(3, dim=-1)
        v = self.whiten1(v, valid) * torch.tanh(self.balancer(s, valid))
        if chunks is not None and self.mixer is None:
            v = chunks.with_kept(self, v.unsqueeze(1))[0].squeeze(1)
        if self.mixer is not None:
            mixed = self.mixer(v.unsqueeze(1), weights, chunks).squeeze(1)
        elif not uniform:
            mixed = weights.mix(v.unsqueeze(1)).squeeze(1)
        elif seen is None:
            mixed = v.mean(1, keepdim=True)
        else:
            values = wide(v)
            share = seen.to(values.dtype)  # (B, 1 or T, T)
            mixed = ((share / share.sum(-1, keepdim=True).clamp(min=1.0)) @ values).to(v.dtype)
        return self.whiten2(self.out_proj(mixed * y), valid)  # type: ignore[no-any-return]


class FeedForward(Scheduled):
    """Linear, SwooshL, dropout, Linear. All frames share a dropout mask; its rate falls from 3 times `dropout` (at most 0.9)."""

    def __init__(self, dim: int, inner: int, dropout: float, activation_dropout: float) -> None:
        super().__init__()
        self.in_proj = Linear(dim, inner)
        self.out_proj = scaled_linear(inner, dim, 0.1)
        self.balancer = Balancer((0.3, 1.0), (0.75, 5.0))
        self.whiten = whitener(7.5)
        self.dropout = Schedule(((0, max(dropout, min(3 * dropout, 0.9))), (20_000, dropout)))
        self.activation_dropout = Dropout(activation_dropout)
        self.activation = swoosh_l

    def kinds(self) -> Mapping[str, Kind]:
        """Declare the kinds of the parts (`layers.kinds.Declared`)."""
        return {"in_proj": Kind(FEED_FORWARD), "out_proj": Kind(FEED_FORWARD, signed=False, activation="activation")}

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:  # (B, T, C)
        x = self.activation(self.balancer(self.in_proj(x), valid))
        if self.training and (rate := self.now(self.dropout)) > 0.0:
            x = x * torch.dropout(x.new_ones(x.size(0), 1, x.size(2)), rate, True)
        return self.whiten(self.out_proj(self.activation_dropout(x)), valid)  # type: ignore[no-any-return]


class ConvolutionModule(nn.Module):
    """Pointwise C -> 2C, gate, depthwise, SwooshR, pointwise C -> C."""

    def __init__(self, dim: int, kernel: int, causal: bool = False) -> None:
        super().__init__()
        self.in_proj = Linear(dim, 2 * dim)
        self.depthwise_conv = DepthwiseConv(dim, kernel, bias=True, causal=causal)
        self.out_proj = scaled_linear(dim, dim, 0.05)
        self.balancer1 = Balancer((Schedule(((0, 0.05), (8_000, 0.025))), 1.0), (1.5, Schedule(((0, 5.0), (8_000, 10.0)))))
        self.balancer2 = Balancer((Schedule(((0, 0.1), (8_000, 0.05))), 1.0), (Schedule(((0, 0.2), (20_000, 0.5))), 10.0))
        self.whiten = whitener(7.5)
        self.activation = swoosh_r

    def kinds(self) -> Mapping[str, Kind]:
        """Declare the kinds of the parts (`layers.kinds.Declared`)."""
        return {
            "in_proj": Kind(POINTWISE),
            "depthwise_conv": Kind(DEPTHWISE),
            "out_proj": Kind(POINTWISE, signed=False, activation="activation"),
        }

    def forward(self, x: Tensor, valid: Tensor | None = None, chunks: Chunks | None = None) -> Tensor:  # (B, T, C)
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = x * torch.sigmoid(self.balancer1(gate, valid))
        if valid is not None:  # the kernel must not carry padding into valid frames
            x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
        x = self.whiten(self.balancer2(self.depthwise_conv(x, chunks), valid), valid)
        return self.out_proj(self.activation(x))  # type: ignore[no-any-return]


class Bypass(Scheduled):
    """x0 + (x - x0) c, where c is a learned scale per channel (section 3.2).

    In training c's gradient keeps it between a minimum that falls from 0.9 to 0.2 and 1, so that all modules learn early, and
    `skip` is the share of sequences for which c is 0.
    """

    MINIMUM = Schedule(((0, 0.9), (20_000, 0.2)))

    def __init__(self, dim: int, skip: Schedule | float = 0.0) -> None:
        super().__init__()
        self.bypass_scale = nn.Parameter(torch.full((dim,), 0.5))
        self.skip = skip

    def forward(self, before: Tensor, after: Tensor) -> Tensor:  # (B, T, C)
        scale: Tensor = self.bypass_scale
        if self.training:
            if chance(LIMIT_RATE):
                scale = limit_parameter(scale, self.now(self.MINIMUM), 1.0)
            scale = skipped(scale.to(before.dtype).expand(before.size(0), 1, -1), self.now(self.skip))
        return torch.addcmul(before, after - before, scale.to(before.dtype))


class NoBypass(nn.Module):
    """Replaces a bypass: returns the modules' output unchanged."""

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        return after


class NormFirst(nn.Module):
    """A module of the residual sum with a norm before it."""

    def __init__(self, norm: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self.norm, self.module = norm, module

    def forward(self, x: Tensor, *args: Any) -> Any:
        """Run the module on x (B, T, C) and its other arguments."""
        return self.module(self.norm(x), *args)


def leave_out(block: nn.Module, kind: type[nn.Module]) -> None:
    """Remove the modules of a kind, which pass on their input, from a block, including their random draws."""
    for module in list(block.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, kind):
                setattr(module, name, NoNorm())


def skipped(x: Tensor, rate: float) -> Tensor:
    """x (B, ...) with zeros for a random share `rate` of its sequences."""
    if rate == 0.0:
        return x
    return x * x.new_empty(x.size(0), *(1,) * (x.dim() - 1)).bernoulli_(1.0 - rate)


class Downsample(nn.Module):
    """Reduces frames to 1 / rate by a learned average of `rate` frames. At rate 1 it does nothing and has no parameters."""

    def __init__(self, rate: int) -> None:
        super().__init__()
        self.rate = rate
        self.log_shares = nn.Parameter(torch.zeros(rate)) if rate > 1 else None

    def down(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, ceil(T / rate), C). The last valid frame (or frame T) is repeated after its end, so padding has no share."""
        if self.log_shares is None:
            return x
        if valid is not None:
            last = torch.where(valid, torch.arange(x.size(1), device=x.device), 0).amax(1)  # (B,)
            x = torch.where(valid.unsqueeze(-1), x, x[torch.arange(x.size(0), device=x.device), last].unsqueeze(1))
        shares = self.log_shares.softmax(0).to(x.dtype)
        if is_exporting():  # one form for all lengths
            x = torch.cat((x, x[:, -1:].expand(-1, self.rate - 1, -1)), dim=1)
            return (x.unfold(1, self.rate, self.rate) * shares).sum(-1)
        excess = -x.size(1) % self.rate
        if excess or is_tracing():
            x = torch.cat((x, x[:, -1:].expand(-1, excess, -1)), dim=1)
        groups = x.view(x.size(0), -1, self.rate, x.size(2))
        return (groups * shares[:, None]).sum(2)


class RateChange(Downsample):
    """Leads into a stack at 1 / rate of the frames and back, by repetition and a bypass."""

    def __init__(self, dim: int, rate: int) -> None:
        super().__init__(rate)
        self.bypass = Bypass(dim) if rate > 1 else None

    def up(self, x: Tensor, before: Tensor) -> Tensor:
        """x (B, ceil(T / rate), C), before (B, T, C) -> (B, T, C)."""
        if self.bypass is None:
            return x
        return self.bypass(before, repeated(x, self.rate, before.size(1)))  # type: ignore[no-any-return]


def fitted(x: Tensor, dim: int) -> Tensor:
    """x (..., C) cut or zero-padded to `dim` channels."""
    return x[..., :dim] if x.size(-1) >= dim else nn.functional.pad(x, (0, dim - x.size(-1)))
