"""Attention decoder: a Transformer (pre-LN) as in Conformer recognizers, or with BatchNorm after every layer (FusionFormer)."""

# B batch, U letters, T frames, D model dim, H heads, V vocabulary

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.attention import attention
from ..layers.dropout import Dropout
from ..layers.folding import fold_after
from ..layers.linear import Linear
from ..layers.norm import norm_of


class _Projected(nn.Module):
    """A linear layer; with BatchNorm it has no bias and the norm follows directly, so both fold into one layer."""

    def __init__(self, inputs: int, outputs: int, batch_norm: bool) -> None:
        super().__init__()
        self.linear = Linear(inputs, outputs, bias=not batch_norm)
        self.norm = norm_of("batch_norm" if batch_norm else "none", outputs)

    def fold(self) -> _Projected:
        """Fold the norm."""
        self.norm = fold_after(self.linear, self.norm)
        return self

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """x (B, N, inputs), valid (B, N) -> (B, N, outputs)."""
        return self.norm(self.linear(x), valid)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """Attention with queries from one sequence, and keys and values from another or the same."""

    def __init__(self, dim: int, heads: int, dropout: float, batch_norm: bool) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (_Projected(dim, dim, batch_norm) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, D / H)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor, attend: Tensor, valid: Tensor | None, memory_valid: Tensor | None) -> Tensor:
        """x (B, U, D), memory (B, N, D), attend broadcastable to (B, H, U, N), False = never seen -> (B, U, D)."""
        q = self.split(self.q_proj(x, valid))
        k, v = self.split(self.k_proj(memory, memory_valid)), self.split(self.v_proj(memory, memory_valid))
        mixed = attention(q, k, v, attend, self.dropout if self.training else 0.0)
        return self.out_proj(mixed.transpose(1, 2).flatten(2), valid)  # type: ignore[no-any-return]

    @torch.no_grad()
    def weights(self, x: Tensor, memory: Tensor, attend: Tensor) -> Tensor:
        """Attention weights (B, H, U, N), as `forward` applies them in eval mode."""
        q, k = self.split(self.q_proj(x, None)), self.split(self.k_proj(memory, None))
        scores = (q @ k.mT) * q.size(-1) ** -0.5
        weights: Tensor = scores.masked_fill(~attend, float("-inf")).softmax(-1)
        return weights


class DecoderBlock(nn.Module):
    """Self-attention over the letters so far, attention to the frames, feed-forward; each a residual sum.

    norm "layer_norm": a LayerNorm before each (pre-LN). "batch_norm": none, but a BatchNorm after every linear layer (Song et al. 2022).
    """

    def __init__(self, dim: int, inner: int, heads: int, dropout: float, norm: str) -> None:
        super().__init__()
        batch_norm = norm == "batch_norm"
        before = "none" if batch_norm else "layer_norm"
        self.self_attn_norm, self.cross_attn_norm, self.ffn_norm = (norm_of(before, dim) for _ in range(3))
        self.self_attn = _Attention(dim, heads, dropout, batch_norm)
        self.cross_attn = _Attention(dim, heads, dropout, batch_norm)
        self.w_1 = _Projected(dim, inner, batch_norm)
        self.w_2 = _Projected(inner, dim, batch_norm)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, memory: Tensor, past: Tensor, attend: Tensor, valid: Tensor | None, memory_valid: Tensor | None
    ) -> Tensor:  # (B, U, D)
        normed = self.self_attn_norm(x)
        x = x + self.dropout(self.self_attn(normed, normed, past, valid, valid))
        x = x + self.dropout(self.cross_attn(self.cross_attn_norm(x), memory, attend, valid, memory_valid))
        inner = self.dropout(F.relu(self.w_1(self.ffn_norm(x), valid)))
        return x + self.dropout(self.w_2(inner, valid))  # type: ignore[no-any-return]


class AttentionDecoder(nn.Module):
    """Letters so far (B, U) and encoder output (B, T, D) -> scores of the next letter (B, U, V).

    Embedding times sqrt(D), sinusoids of the position, blocks (Vaswani et al. 2017, section 3), with pre-LN a LayerNorm at the end.
    `right` is None, or a second decoder beside it that says texts from their end (U2++, Wu et al. 2021); its letters are those
    of `backwards`.
    """

    def __init__(self, vocabulary: int, dim: int, layers: int, inner: int, heads: int, dropout: float, norm: str) -> None:
        super().__init__()
        self.right: AttentionDecoder | None = None
        self.embedding = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.layers = nn.ModuleList([DecoderBlock(dim, inner, heads, dropout, norm) for _ in range(layers)])
        self.layer_norm = norm_of("none" if norm == "batch_norm" else "layer_norm", dim)
        self.output = Linear(dim, vocabulary)
        self.dropout = Dropout(dropout)

    def embed(self, letters: Tensor) -> Tensor:
        """(B, U) -> (B, U, D): embeddings and sinusoids of the positions."""
        dim = self.embedding.embedding_dim
        x = self.embedding(letters) * math.sqrt(dim)
        rates = torch.exp(torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) * (-math.log(10_000.0) / dim))
        angles = torch.arange(letters.size(1), device=x.device, dtype=torch.float32)[:, None] * rates  # (U, D / 2)
        return x + torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :dim].to(x.dtype)  # type: ignore[no-any-return]

    def forward(
        self, letters: Tensor, memory: Tensor, memory_padding: Tensor | None = None, valid: Tensor | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """letters (B, U), first the end mark; memory_padding (B, T), True = padding; valid (B, U), False = filler at the end.

        `weights`: a list that each block's attention weights over the frames (B, H, U, T) are appended to.
        """
        steps = letters.size(1)
        past = torch.ones(steps, steps, dtype=torch.bool, device=letters.device).tril()  # filler is behind, so no letter sees it
        memory_valid = None if memory_padding is None else ~memory_padding
        attend = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=letters.device) if memory_valid is None else memory_valid[:, None, None]
        x = self.dropout(self.embed(letters))
        for block in self.layers:
            if weights is not None:
                weights.append(_cross_weights(block, x, memory, past, attend))
            x = block(x, memory, past, attend, valid, memory_valid)
        return self.output(self.layer_norm(x))  # type: ignore[no-any-return]


@torch.no_grad()
def _cross_weights(block: nn.Module, x: Tensor, memory: Tensor, past: Tensor, attend: Tensor) -> Tensor:
    assert isinstance(block, DecoderBlock)
    normed = block.self_attn_norm(x)
    x = x + block.self_attn(normed, normed, past, None, None)
    return block.cross_attn.weights(block.cross_attn_norm(x), memory, attend)


def shifted(targets: Tensor, lengths: Tensor, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Targets (B, U) of `lengths` (B,) -> decoder input (B, U + 1) from `end` on, what it predicts, up to `end`, and which are valid."""
    batch, longest = targets.shape
    place = torch.arange(longest + 1, device=targets.device)
    letters = targets.masked_fill(place[None, :longest] >= lengths[:, None], end)
    edge = letters.new_full((batch, 1), end)
    return torch.cat((edge, letters), 1), torch.cat((letters, edge), 1), place[None] <= lengths[:, None]


def backwards(targets: Tensor, lengths: Tensor) -> Tensor:
    """Reverse targets (B, U) of `lengths` (B,); the filler behind them has no meaning."""
    place = lengths[:, None] - 1 - torch.arange(targets.size(1), device=targets.device)
    return targets.gather(1, place.clamp(min=0))
