"""Multi-head self-attention through `F.scaled_dot_product_attention`, or, with dropout on a CPU, through our own of the same form."""

# B batch, T frames, D model dim, H heads, d = D / H

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .dropout import keep_mask
from .linear import Linear, linear, product, takes_onednn


class _DropoutAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(d) + bias), dropout, times v.

    With dropout torch's attention on a CPU runs unfused, through slower products and one random draw per element.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, p: float) -> Tensor:
        batch, heads, queries, size = q.shape
        rows = (q * size**-0.5).reshape(-1, queries, size)  # (B H, T, d)
        keys, values = k.reshape(-1, k.size(2), size).contiguous(), v.reshape(-1, k.size(2), size).contiguous()
        probs = _products(rows, keys).view(batch, heads, queries, -1)
        if bias is not None:
            probs += bias
        probs = probs.softmax(-1).view(batch * heads, queries, -1)
        mask, ctx.scale = keep_mask(probs.shape, p)
        mixed = _products((probs * mask).mul_(ctx.scale), values.transpose(1, 2))
        ctx.save_for_backward(rows, keys, values, probs, mask, mixed)
        return mixed.view_as(q)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        rows, keys, values, probs, mask, mixed = ctx.saved_tensors
        shape = grad.shape
        grad = grad.reshape(mixed.shape).contiguous()
        dropped = (probs * mask).mul_(ctx.scale)
        grad_values = _products(dropped.transpose(1, 2), grad.transpose(1, 2))
        # d softmax: P (dP - sum(dP P)), and sum(dP P) over the keys is grad . output
        scores = _products(grad, values).mul_(mask).mul_(ctx.scale)
        scores = scores.sub_((grad * mixed).sum(-1, keepdim=True)).mul_(probs)
        grad_rows = _products(scores, keys.transpose(1, 2)).mul_(shape[-1] ** -0.5)
        grad_keys = _products(scores.transpose(1, 2), rows.transpose(1, 2))
        split = (shape[0], shape[1], -1, shape[3])
        grad_bias = scores.view(shape[0], shape[1], shape[2], -1) if ctx.needs_input_grad[3] else None
        return grad_rows.view(shape), grad_keys.view(split), grad_values.view(split), grad_bias, None


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a (N, M, K), b (N, L, K) -> a b' (N, M, L)."""
    out = a.new_empty(a.size(0), a.size(1), b.size(1))
    for index in range(a.size(0)):
        out[index] = product(a[index], b[index])
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """`F.scaled_dot_product_attention` of q (B, H, T, d), k and v (B, H, T', d); bias: bool (False = never seen) or float, or None."""
    if dropout == 0.0 or not takes_onednn(q, k):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill(~bias, float("-inf"))
    return _DropoutAttention.apply(q, k, v, bias, dropout)  # type: ignore[no-any-return,no-untyped-call]


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
        mixed = attention(q, k, v, attend, dropout)
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
            mixed.append(attention(content[:, :, start:stop], k, v, bias, dropout))
        return self.out_proj(torch.cat(mixed, dim=2).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
