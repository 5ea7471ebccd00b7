"""One-bit attention, against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hubert_eff.layers.sparse import SparsePattern
from hubert_eff.quant import Quantizer
from hubert_eff.quant.attention import BinaryAttention, BinaryRelativeAttention, BinarySparseAttention

from ..helpers.simulated import masked_by

# -- attention -------------------------------------------------------------------------------------------------------------


def naive(scores: Tensor, seen: Tensor, products: BinaryAttention, v: Tensor) -> Tensor:
    """Mixed values from all scores (B, H, T, T) at once, at one bit; seen broadcasts to them."""
    probs = torch.softmax(scores.masked_fill(~seen, -1e30), -1)
    visible = seen.sum(-1, keepdim=True)
    scale = products.probabilities.quantizer.scale
    bits = torch.where(probs * visible > scale / 2, scale, torch.zeros((), dtype=scale.dtype)) / visible
    return bits @ (torch.where(v + products.value.move > 0, 1.0, -1.0) * products.value.scale)


def signed(x: Tensor, quantizer: Quantizer) -> Tensor:
    moved = x if quantizer.move is None else x + quantizer.move
    return torch.where(moved > 0, 1.0, -1.0) * quantizer.scale


def operands(frames: int) -> tuple[list[Tensor], Tensor, dict[str, tuple[int, ...]]]:
    tensors = [torch.randn(2, 4, frames, 8, dtype=torch.float64) for _ in range(3)]
    valid = torch.arange(frames) < torch.tensor([[frames], [2 * frames // 3]])
    return tensors, valid, dict.fromkeys(("query", "key", "value"), (4, 1, 8))


def started(products: nn.Module, valid: Tensor) -> nn.Module:
    products.double().train()
    for part in products.modules():
        if isinstance(part, Quantizer) and part.move is not None:
            nn.init.normal_(part.move, std=0.1)
    return masked_by(products, valid)


def test_dense_attention() -> None:
    (q, k, v), valid, shapes = operands(150)  # more than one chunk of queries
    products = started(BinaryAttention(1, shapes), valid)
    attend = valid[:, None, None]
    mixed = products(q, k, v, attend, 0.0)
    scores = signed(q, products.query) @ signed(k, products.key).mT / math.sqrt(8)
    torch.testing.assert_close(mixed, naive(scores, attend, products, v))
    assert 0.05 < (mixed != 0).double().mean()


def test_relative_attention() -> None:
    (q, k, v), valid, shapes = operands(150)
    r, other = torch.randn(4, 299, 8, dtype=torch.float64), torch.randn_like(q)
    products = started(BinaryRelativeAttention(1, {n: shapes[n] for n in ("key", "value")}), valid)
    attend = valid[:, None, None]
    mixed = products(q, other, k, r, v, attend, 0.0)
    table = signed(r, products.offset)
    place = 149 - torch.arange(150)[:, None] + torch.arange(150)  # row of the offset i - j
    positions = torch.einsum("bhid,hijd->bhij", signed(other, products.position), table[:, place])
    scores = (signed(q, products.content) @ signed(k, products.key).mT + positions) / math.sqrt(8)
    torch.testing.assert_close(mixed, naive(scores, attend, products, v))


@pytest.mark.parametrize("pattern", [SparsePattern("fixed", 16, 3, 1), SparsePattern("fairseq", 16, 3, 1), SparsePattern("local", 1, 1, 9)])
@pytest.mark.parametrize("padded", [True, False])
def test_sparse_attention_is_dense_attention_under_its_mask(pattern: SparsePattern, padded: bool) -> None:
    (q, k, v), valid, shapes = operands(150)
    products = started(BinarySparseAttention(1, shapes), valid if padded else torch.ones_like(valid))
    attend = valid[:, None, None] if padded else torch.ones(1, 1, 1, 150, dtype=torch.bool)
    mixed = products(q, k, v, attend if padded else None, 0.0, pattern)
    i, j = torch.arange(150)[:, None], torch.arange(150)
    if pattern.kind == "local":
        seen = (i - j).abs() <= pattern.window
    elif pattern.kind == "fixed":
        seen = (i // 16 == j // 16) | (j % 16 >= 13)
    else:
        seen = ((i - 1).clamp(min=0) // 16 == (j - 1).clamp(min=0) // 16) | ((j - 1) % 16 >= 12) & (j > 0)
    seen = seen & attend
    scores = signed(q, products.query) @ signed(k, products.key).mT / math.sqrt(8)
    expected = naive(scores, seen, products, v)
    some = seen.any(-1, keepdim=True)
    torch.testing.assert_close(torch.where(some, mixed, 0.0), torch.where(some, expected, 0.0))


def test_two_bit_probabilities_give_unseen_keys_nothing() -> None:
    (q, k, v), valid, shapes = operands(40)
    products = started(BinaryAttention(2, shapes), valid)
    mixed = products(q, k, v, valid[:, None, None], 0.0)
    changed = torch.where(valid[:, None, :, None], v, 100.0)
    assert torch.equal(mixed, products(q, k, changed, valid[:, None, None], 0.0))
