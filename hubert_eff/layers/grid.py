"""Layers in the layout of accelerators, (B, C, 1, T): channels first, time last (Xu et al. 2024, section 3; Apple's "Deploying Transformers
on the Neural Engine", 2022). Linear layers are 1 x 1 convolutions, heads are separate, and attention is one einsum per head, without a
transposed copy.

A block with such a layout has `channels_first()`, which builds its twin from the modules here; `hubert_eff.edge.rewrite` calls it.
"""

# B batch, T frames, C channels, d head dim

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bits import Cost, attention_cost, counted_as, offsets_seen
from .chunks import Chunks, Frames
from .convolution import DepthwiseConv, GroupedConv2d
from .position import CHUNK, by_key
from .precision import wide


@runtime_checkable
class ChannelsFirst(Protocol):
    """A module with a twin in the layout (B, C, 1, T), which is called as twin(x, frames); they share no parameters."""

    def channels_first(self) -> nn.Module:
        """Build the twin of this module, which is fused and in eval mode."""


def pointwise(layer: nn.Linear) -> nn.Conv2d:
    """Turn a linear layer into a 1 x 1 convolution."""
    conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None, device="meta")
    conv.weight = nn.Parameter(layer.weight.detach()[:, :, None, None].contiguous())
    conv.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
    return conv


def depthwise(layer: DepthwiseConv) -> GridDepthwise:
    """Build the twin of a depthwise convolution over time with stride 1."""
    return GridDepthwise(layer)


class Framed(nn.Module):
    """A module of the grid that is called with its input (B, C, 1, T) and `Frames`, as blocks are."""


class GridConv(GroupedConv2d):
    """A grouped convolution over time in (B, C, 1, T), centered or causal, with a given weight (N, C / groups, k)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, groups: int, causal: bool) -> None:
        channels, _, kernel = weight.shape
        super().__init__(channels, channels, (1, kernel), groups=groups, bias=bias is not None, device="meta")
        self.reach = (kernel - 1, 0) if causal else (kernel // 2, (kernel - 1) // 2)
        self.weight = nn.Parameter(weight.detach().unsqueeze(2).clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def over_time(self, x: Tensor, chunks: Chunks | None) -> Tensor:
        """(B, C, 1, T) -> (B, C, 1, T); with `chunks`, a frame sees zeros beyond the end of its chunk."""
        if chunks is None:
            return self(F.pad(x, self.reach))  # type: ignore[no-any-return]
        y = chunks.convolved(self, x.squeeze(2).mT, *self.reach, lambda w: self(w.mT.unsqueeze(2)).squeeze(2).mT)
        return y[:, : x.size(3)].mT.unsqueeze(2)


class GridDepthwise(Framed):
    """The twin of a `DepthwiseConv` of stride 1."""

    def __init__(self, source: DepthwiseConv) -> None:
        super().__init__()
        self.conv = GridConv(source.weight, source.bias, source.weight.size(0), source.causal)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        """(B, C, 1, T) -> (B, C, 1, T)."""
        if frames.valid is not None:  # the kernel must not carry padding into valid frames
            x = x.masked_fill(~frames.valid[:, None, None], 0.0)
        return self.conv.over_time(x, frames.chunks)


class GridNorm(nn.Module):
    """LayerNorm over the channels of (B, C, 1, T)."""

    def __init__(self, source: nn.LayerNorm) -> None:
        super().__init__()
        assert source.weight is not None
        self.weight = nn.Parameter(source.weight.detach().clone())
        self.bias = nn.Parameter(source.bias.detach().clone())
        self.eps = source.eps
        self.norm: Callable[..., Tensor] | None = None  # replaces it: (x, weight, bias, eps, dim=)

    @counted_as("norm", lambda _, x: Cost(0, x.numel()))
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.view(-1, 1, 1), self.bias.view(-1, 1, 1)
        if self.norm is not None:
            return self.norm(x, weight, bias, self.eps, dim=1)
        y = x - x.mean(1, keepdim=True)
        y = y * torch.rsqrt(wide(y).square().mean(1, keepdim=True) + self.eps).to(y.dtype)
        return y * weight + bias


def grid_norm(norm: nn.Module) -> nn.Module:
    """Build the twin of a LayerNorm or a BatchNorm, or an identity for a norm that has been folded."""
    if isinstance(norm, nn.BatchNorm1d):
        twin = nn.BatchNorm2d(norm.num_features, norm.eps)
        twin.load_state_dict(norm.state_dict())
        return twin
    return GridNorm(norm) if isinstance(norm, nn.LayerNorm) else nn.Identity()


def _cost(attention: GridAttention, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, attend: Tensor | None) -> Cost:
    heads, batch, width, queries, keys = attention.heads, q.size(0), q.size(1) // attention.heads, q.size(3), k.size(3)
    of_queries, of_keys = (q.new_empty(batch, heads, frames, width, device="meta") for frames in (queries, keys))
    macs, element_ops = attention_cost(of_queries, of_keys, of_keys, masked=table is not None or attend is not None)
    by_offset = 0 if table is None else batch * offsets_seen(queries, keys, CHUNK) * q.size(1)
    return Cost(macs + by_offset, element_ops)


class GridAttention(Framed):
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
        self.softmax: Callable[[Tensor], Tensor] | None = None  # replaces torch's, over the last dimension

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        """(B, C, 1, T) -> (B, C, 1, T)."""
        q, k, v = self.qkv(x).chunk(3, 1)
        chunks = frames.chunks
        if chunks is not None and chunks.kept is not None:  # along time, the dimension in which they are joined
            k, v = (part.permute(0, 3, 1, 2) for part in chunks.with_kept(self, k.permute(0, 2, 3, 1), v.permute(0, 2, 3, 1)))
        return self.out(self._mixed(q, k, v, self._offsets(frames), frames.attend))  # type: ignore[no-any-return]

    def _offsets(self, frames: Frames) -> Tensor | None:
        """Projected offsets from queries to keys, (2T - 1, C), T the number of keys."""
        projection, positions, chunks = self.linear_pos, frames.positions, frames.chunks
        if projection is None or positions is None:
            return None
        if chunks is None:
            return projection(positions)  # type: ignore[no-any-return]
        return chunks.table(self, (positions.size(0) + 1) // 2, lambda: projection(positions))  # type: ignore[no-any-return]

    @counted_as("attention", _cost)
    def _mixed(self, joint_q: Tensor, joint_k: Tensor, joint_v: Tensor, table: Tensor | None, attend: Tensor | None) -> Tensor:
        q, k, v = (part.chunk(self.heads, 1) for part in (joint_q, joint_k, joint_v))  # per head (B, d, 1, T)
        scale = q[0].size(1) ** -0.5
        offsets = () if table is None else table[: k[0].size(3) + q[0].size(3) - 1].chunk(self.heads, 1)  # per head (offsets, d)
        mixed = []
        for head in range(self.heads):
            query = q[head] + self.u[head] if offsets else q[head]
            scores = torch.einsum("bchq,bchk->bhqk", query * scale, k[head])  # (B, 1, queries, keys)
            if offsets:
                scores = scores + by_key(torch.einsum("bchq,pc->bhqp", (q[head] + self.v[head]) * scale, offsets[head]))
            if attend is not None:
                scores = scores.masked_fill(~attend, float("-inf"))
            probs = torch.softmax(scores, -1) if self.softmax is None else self.softmax(scores)
            mixed.append(torch.einsum("bhqk,bchk->bchq", probs, v[head]))
        return torch.cat(mixed, 1)


class Glu(nn.Module):
    """GLU over the channels of (B, 2C, 1, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(x, 1)


class GridBlock(Framed):
    """Runs modules one after the other."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        for part in self.parts:
            x = part(x, frames) if isinstance(part, Framed) else part(x)
        return x


class Residual(GridBlock):
    """x + factor * the output of the modules for x."""

    def __init__(self, *parts: nn.Module, factor: float = 1.0) -> None:
        super().__init__(*parts)
        self.factor = factor

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        return torch.add(x, super().forward(x, frames), alpha=self.factor)
