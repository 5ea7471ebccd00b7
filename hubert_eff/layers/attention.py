"""Multi-head self-attention through `F.scaled_dot_product_attention`."""

# B batch, T frames, D model dim, H heads, d = D / H

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import Linear, linear


class SelfAttention(nn.Module):
    """Dense self-attention, (B, T, D) -> (B, T, D). Projections are stored apart, as in fairseq, and applied as one product."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.q_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, T, d)."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weight, bias = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
        q, k, v = linear(x, weight, bias).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        """`attend`: bool, broadcastable to (B, H, T, T), False = never seen."""
        q, k, v = self.heads_of(x)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class RelativeSelfAttention(SelfAttention):
    """Self-attention with relative positions (Transformer-XL, section 3.3; Conformer, section 2.1).

    score[i, j] = ((q_i + u) k_j + (q_i + v) p_{i-j}) / sqrt(d), p = linear_pos(positions). Queries are taken in chunks, and the shift from
    offsets to keys is a strided view of each chunk's product, so that no (T, 2T - 1) tensor is copied.
    """

    CHUNK = 128  # queries per chunk: the position products of a chunk stay in cache

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim, heads, dropout)
        self.linear_pos = Linear(dim, dim, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, dim // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, dim // heads))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(self, x: Tensor, positions: Tensor, attend: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """`positions`: (2T - 1, D), sinusoids of the offsets T-1 .. -(T-1); `attend` as above, but without a query dimension of its own."""
        batch, frames, dim = x.shape
        q, k, v = self.heads_of(x)
        p = self.linear_pos(positions).view(-1, self.heads, dim // self.heads).permute(1, 2, 0)
        content = q + self.pos_bias_u[:, None]
        position = (q + self.pos_bias_v[:, None]) * (dim // self.heads) ** -0.5
        dropout = self.dropout if self.training else 0.0
        mixed = []
        for start in range(0, frames, self.CHUNK):
            stop = min(start + self.CHUNK, frames)
            n = stop - start
            span = frames + n - 1  # offsets that this chunk's queries see
            product = position[:, :, start:stop] @ p[:, :, frames - stop : frames - stop + span]  # (B, H, n, span)
            # row i holds offsets (stop - 1 - start) .. : key j of query start + i stands at column n - 1 - i + j
            bias = product.contiguous().as_strided(
                (batch, self.heads, n, frames), (self.heads * n * span, n * span, span - 1, 1), n - 1
            )
            if attend is not None:
                bias = bias.masked_fill(~attend, float("-inf"))
            mixed.append(
                F.scaled_dot_product_attention(content[:, :, start:stop], k, v, attn_mask=bias, dropout_p=dropout)
            )
        return self.out_proj(torch.cat(mixed, dim=2).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
