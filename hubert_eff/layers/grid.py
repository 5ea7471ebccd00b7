"""Layers in the layout of accelerators, (B, C, 1, T): channels first, time last (Xu et al. 2024, section 3; Apple's "Deploying Transformers
on the Neural Engine", 2022). Linear layers are 1 x 1 convolutions, heads are split apart, and attention is one einsum per head, without a
transposed copy.

A block that can be laid out so has `channels_first()`, which makes its twin of the modules here; `hubert_eff.edge.rewrite` asks for it.
"""

# B batch, T frames, C channels, d head dim

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bits import Cost, attention_cost, counted_as, offsets_seen
from .convolution import DepthwiseConv, GroupedConv2d
from .position import CHUNK
from .precision import wide


@runtime_checkable
class ChannelsFirst(Protocol):
    """A module with a twin in the layout (B, C, 1, T), which is called as twin(x, positions); both share no parameters."""

    def channels_first(self) -> nn.Module:
        """The twin, of a fused module in eval mode."""


def pointwise(layer: nn.Linear) -> nn.Conv2d:
    """A linear layer as a 1 x 1 convolution."""
    conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None, device="meta")
    conv.weight = nn.Parameter(layer.weight.detach()[:, :, None, None].contiguous())
    conv.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
    return conv


def depthwise(layer: DepthwiseConv) -> nn.Module:
    """A depthwise convolution over time, stride 1."""
    channels, _, kernel = layer.weight.shape
    padding = (0, 0 if layer.causal else kernel // 2)
    conv = GroupedConv2d(channels, channels, (1, kernel), padding=padding, groups=channels, bias=layer.bias is not None, device="meta")
    conv.weight = nn.Parameter(layer.weight.detach().unsqueeze(2).clone())
    conv.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
    return nn.Sequential(nn.ZeroPad2d((kernel - 1, 0, 0, 0)), conv) if layer.causal else conv


class GridNorm(nn.Module):
    """LayerNorm over the channels of (B, C, 1, T)."""

    def __init__(self, source: nn.LayerNorm) -> None:
        super().__init__()
        assert source.weight is not None
        self.weight = nn.Parameter(source.weight.detach().clone())
        self.bias = nn.Parameter(source.bias.detach().clone())
        self.eps = source.eps
        self.norm: Callable[..., Tensor] | None = None  # in its place, over the last dimension: (x, weight, bias, eps)

    @counted_as("norm", lambda _, x: Cost(0, x.numel()))
    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            return self.norm(x.transpose(1, 3), self.weight, self.bias, self.eps).transpose(1, 3)
        y = x - x.mean(1, keepdim=True)
        y = y * torch.rsqrt(wide(y).square().mean(1, keepdim=True) + self.eps).to(y.dtype)
        return y * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def grid_norm(norm: nn.Module) -> nn.Module:
    """The twin of a LayerNorm or a BatchNorm; of what folding has left in the place of one, nothing."""
    if isinstance(norm, nn.BatchNorm1d):
        twin = nn.BatchNorm2d(norm.num_features, norm.eps)
        twin.load_state_dict(norm.state_dict())
        return twin
    return GridNorm(norm) if isinstance(norm, nn.LayerNorm) else nn.Identity()


def _cost(attention: GridAttention, joint: Tensor, offsets: Tensor | None) -> Cost:
    batch, channels, _, frames = joint.shape
    heads = joint.new_empty(batch, attention.heads, frames, channels // 3 // attention.heads, device="meta")
    macs, element_ops = attention_cost(heads, heads, heads, masked=offsets is not None)
    by_offset = 0 if offsets is None else batch * offsets_seen(frames, frames, CHUNK) * channels // 3
    return Cost(macs + by_offset, element_ops)


class GridAttention(nn.Module):
    """Self-attention head by head; with `linear_pos` and `moves`, u and v, relative positions too (Transformer-XL, section 3.3)."""

    u: Tensor
    v: Tensor

    def __init__(
        self, qkv: nn.Linear, out: nn.Linear, heads: int, linear_pos: nn.Linear | None = None, moves: tuple[Tensor, ...] = ()
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = pointwise(qkv), pointwise(out)
        self.linear_pos = linear_pos
        width = qkv.in_features // heads
        for name, move in zip(("u", "v"), moves):  # of queries, per head (d, 1, 1)
            self.register_buffer(name, move.detach().view(heads, width, 1, 1).clone())
        self.softmax: Callable[[Tensor], Tensor] | None = None  # in the place of torch's, over the last dimension

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:  # (B, C, 1, T); (2T - 1, C)
        offsets = self.linear_pos(positions) if self.linear_pos is not None and positions is not None else None
        return self.out(self._mixed(self.qkv(x), offsets))  # type: ignore[no-any-return]

    @counted_as("attention", _cost)
    def _mixed(self, joint: Tensor, table: Tensor | None) -> Tensor:  # (B, 3 C, 1, T); (2T - 1, C)
        q, k, v = (part.chunk(self.heads, 1) for part in joint.chunk(3, 1))  # per head (B, d, 1, T)
        scale = q[0].size(1) ** -0.5
        offsets = () if table is None else table.chunk(self.heads, 1)  # per head (2T - 1, d)
        mixed = []
        for head in range(self.heads):
            query = q[head] + self.u[head] if offsets else q[head]
            scores = torch.einsum("bchq,bchk->bhqk", query * scale, k[head])  # (B, 1, queries, keys)
            if offsets:
                scores = scores + self._moved(torch.einsum("bchq,pc->bqp", (q[head] + self.v[head]) * scale, offsets[head]))
            probs = torch.softmax(scores, -1) if self.softmax is None else self.softmax(scores)
            mixed.append(torch.einsum("bhqk,bchk->bchq", probs, v[head]))
        return torch.cat(mixed, 1)

    @staticmethod
    def _moved(by_offset: Tensor) -> Tensor:
        """(B, T, 2T - 1), row q of the offsets T-1 .. -(T-1) from query to key -> (B, 1, queries, keys)."""
        batch, frames, span = by_offset.shape
        rows = F.pad(by_offset, (1, 0)).view(batch, span + 1, frames)[:, 1:].reshape(batch, frames, span)
        return rows[:, None, :, :frames]


class Glu(nn.Module):
    """GLU over the channels of (B, 2C, 1, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(x, 1)


class Residual(nn.Module):
    """x + factor * last(... first(x))."""

    def __init__(self, *parts: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.parts, self.factor = nn.ModuleList(parts), factor

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        y = x
        for part in self.parts:
            y = part(y, positions) if isinstance(part, GridAttention) else part(y)
        return torch.add(x, y, alpha=self.factor)


class GridBlock(nn.Module):
    """Residual sums and norms, one after the other."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        for part in self.parts:
            x = part(x, positions) if isinstance(part, Residual) else part(x)
        return x
