"""Gradients of binary convolutions and attention, held to the stated straight-through formulas written out with autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_eff.layers.sparse import SparsePattern
from hubert_eff.quant import BinaryConv1d, Quantizer
from hubert_eff.quant.attention import BinaryAttention, BinarySparseAttention
from hubert_eff.quant.modules import FrameMask

B, T, H, D = 2, 50, 2, 8
VALID = torch.arange(T) < torch.tensor([[T], [31]])


def with_gradient(value: Tensor, x: Tensor, inside: Tensor, scale: Tensor, of_scale: Tensor, count: int) -> Tensor:
    """`value`, with dy/dx = inside and dy/da = of_scale / sqrt(count)."""
    learned = (scale - scale.detach()) * of_scale / math.sqrt(count)
    return value + learned + (x - x.detach()) * inside


def signed(x: Tensor, scale: Tensor, bits: int, count: int) -> Tensor:
    q = (x / scale).detach()
    if bits == 1:
        sign = torch.where(q > 0, 1.0, -1.0).to(q)
        return with_gradient(scale.detach() * sign, x, (q.abs() <= 1).to(q), scale, sign, count)
    codes, inside = q.round().clamp(-2, 1), (q >= -2) & (q <= 1)
    return with_gradient(scale.detach() * codes, x, inside.to(q), scale, torch.where(inside, q.round() - q, codes), count)


def unsigned(x: Tensor, scale: Tensor, bits: int, count: int, least: Tensor | float) -> Tensor:
    top = 2**bits - 1
    q = ((x - least) / scale).detach()
    codes, inside = (q > 0.5).to(q) if bits == 1 else q.round().clamp(0, top), (q >= 0) & (q <= top)
    of_scale = torch.where(inside, codes - q, torch.where(q > top, float(top), 0.0).to(q))
    return with_gradient(scale.detach() * codes + least, x, inside.to(q), scale, of_scale, count * top)


def prepare(module: nn.Module, *inputs: object) -> nn.Module:
    """In double precision, its scales started, its moves no longer zero, the second row of the batch padded."""
    module.double().train()
    frames = FrameMask()
    frames.valid = VALID
    for part in module.modules():
        if isinstance(part, Quantizer):
            part.frames = frames
    module(*inputs)
    for name, parameter in module.named_parameters():
        if name.endswith("move"):
            nn.init.normal_(parameter, std=0.1)
    return module


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def same(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert b.grad is not None and b.grad.abs().sum() > 0
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("takes_signs", [True, False])
@pytest.mark.parametrize("out, kernel, stride, groups", [(D, 5, 1, D), (4, 3, 1, 2), (6, 1, 1, 1), (D, 2, 2, 1)])
def test_convolution(out: int, kernel: int, stride: int, groups: int, takes_signs: bool, bits: int) -> None:
    x = torch.randn(B, T, D, dtype=torch.float64)
    if not takes_signs:
        x = x.relu()
    layer = prepare(BinaryConv1d(D, out, kernel, stride=stride, groups=groups, bits=bits, signed=takes_signs), x)
    (source,), (copy, weight, scale, move) = leaves(x), leaves(x, layer.weight, layer.input.scale, layer.input.move)
    y = layer(source)
    g = torch.randn_like(y)
    (y * g).sum().backward()

    seen, moved = VALID.unsqueeze(-1), copy + move
    if takes_signs:
        quantized = signed(moved, scale, bits, int(VALID.sum()) * D)
    else:
        least = 0.0 if bits == 1 else moved.detach().masked_fill(~seen, math.inf).amin((1, 2), keepdim=True)
        quantized = unsigned(moved, scale, bits, int(VALID.sum()) * D, least)
    rows = weight.detach().flatten(1)
    size = rows.abs().mean(1).view(-1, 1, 1)
    center = rows.mean() if groups == 1 else torch.zeros(()) if groups == D else rows.mean(1).view(-1, 1, 1)
    binary = torch.where(weight > center, size, -size).detach() + weight - weight.detach()
    before = kernel // 2 if stride == 1 else 0
    after = before if stride == 1 else max(0, kernel - stride + -T % stride)
    padded = F.pad(torch.where(seen, quantized, 0.0).mT, (before, after))
    expected = F.conv1d(padded, binary, layer.bias, stride, groups=groups).mT
    torch.testing.assert_close(y, expected)
    (expected * g).sum().backward()
    same([source, layer.weight, layer.input.scale, layer.input.move], [copy, weight, scale, move])


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("sparse", [False, True])
def test_attention(sparse: bool, bits: int) -> None:
    inputs = [torch.randn(B, H, T, D, dtype=torch.float64) for _ in range(3)]
    names, attend = ("query", "key", "value"), VALID[:, None, None]
    moves = dict.fromkeys(names, (H, 1, D))
    products = BinarySparseAttention(bits, moves) if sparse else BinaryAttention(bits, moves)
    options = (attend, 0.0, SparsePattern("fixed", 16, 3, 1)) if sparse else (attend, 0.0)
    prepare(products, *inputs, *options)
    mine = leaves(*inputs)
    rows = VALID[:, None, :, None]
    y = products(*mine, *options) * rows
    g = torch.randn_like(y)
    (y * g).sum().backward()

    quantizers = [getattr(products, name) for name in names]
    theirs, scales, shifts = leaves(*inputs), leaves(*(q.scale for q in quantizers)), leaves(*(q.move for q in quantizers))
    (top,) = leaves(products.probabilities.quantizer.scale)
    q, k, v = (signed(x + b, a, bits, int(VALID.sum()) * H * D) for x, b, a in zip(theirs, shifts, scales, strict=True))
    place = torch.arange(T)
    seen = attend & ((place[:, None] // 16 == place // 16) | (place % 16 >= 13)) if sparse else attend.expand(B, 1, T, T)
    visible = seen.sum(-1, keepdim=True)
    x = visible * torch.softmax((q @ k.mT / math.sqrt(D)).masked_fill(~seen, -1e30), -1)
    least = 0.0 if bits == 1 else x.detach().masked_fill(~seen, math.inf).amin(-1, keepdim=True)
    probabilities = torch.where(seen, unsigned(x, top, bits, H * int((seen & rows).sum()), least), 0.0)
    expected = (probabilities / visible) @ v * rows
    torch.testing.assert_close(y, expected)
    (expected * g).sum().backward()
    same([*mine, *(q.scale for q in quantizers), *(q.move for q in quantizers)], [*theirs, *scales, *shifts])
    # sparse attention counts about as many visible keys as there are
    torch.testing.assert_close(products.probabilities.quantizer.scale.grad, top.grad, rtol=0.05 if sparse else 1e-7, atol=0.0)
