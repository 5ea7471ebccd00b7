"""Layers that replace one of torch: same numbers."""

from __future__ import annotations

import pytest
import torch

from hubert_eff.layers.attention import _fused, attention
from hubert_eff.layers.convolution import strided_conv
from hubert_eff.layers.dropout import Dropout, keep_signs
from hubert_eff.layers.linear import Linear
from hubert_eff.models.extractor import TimeNorm


@pytest.mark.parametrize("shape", [(2, 7, 12), (5, 12), (12,), (0, 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_equals_torch(shape: tuple[int, ...], bias: bool, transposed: bool) -> None:
    ours, theirs = Linear(12, 9, bias=bias), torch.nn.Linear(12, 9, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape)
    if transposed and len(shape) == 3:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    results = []
    for layer in (ours, theirs):
        inner = x.clone().requires_grad_()
        y = layer(inner)
        y.square().sum().backward()
        results.append((y, inner.grad, *(p.grad for p in layer.parameters())))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), y)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_linear_under_autocast_and_in_double() -> None:
    layer = Linear(12, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 12)).dtype == torch.bfloat16
    assert layer.double()(torch.randn(3, 12, dtype=torch.float64)).dtype == torch.float64


def test_linear_compiles() -> None:
    layer = Linear(12, 9)
    x = torch.randn(3, 12)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 2), (2, 2), (10, 5), (3, 1), (2, 3)])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_strided_convolution_equals_torch(kernel: int, stride: int, channels: int, bias: bool) -> None:
    conv = torch.nn.Conv1d(channels, 6, kernel, stride, bias=bias)
    x = torch.randn(2, 53, channels)
    results = []
    for ours in (True, False):
        conv.zero_grad()
        inner = x.clone().requires_grad_()
        y = strided_conv(inner, conv.weight, conv.bias, stride) if ours else conv(inner.transpose(1, 2)).transpose(1, 2)
        y.square().sum().backward()
        results.append((y.detach(), inner.grad, *(p.grad.clone() for p in conv.parameters())))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(strided_conv(x, conv.weight, conv.bias, stride), results[0][0], rtol=1e-4, atol=1e-5)


def test_time_norm_equals_group_norm() -> None:
    ours, theirs = TimeNorm(5), torch.nn.GroupNorm(5, 5)
    theirs.weight.data.normal_()
    theirs.bias.data.normal_()
    ours.load_state_dict(theirs.state_dict())
    results = []
    for layer in (ours, theirs):
        x = (torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(1)) * 3 + 1).requires_grad_()
        y = layer(x) if layer is ours else layer(x.transpose(1, 2)).transpose(1, 2)
        (y**3).sum().backward()
        results.append((y, x.grad, layer.weight.grad, layer.bias.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_share_and_the_mean(p: float) -> None:
    layer = Dropout(p).train()
    x = torch.ones(301, 1_003, requires_grad=True)
    y = layer(x)
    assert abs(float((y == 0).float().mean()) - p) < 0.005
    assert abs(float(y.detach().mean()) - 1) < 0.01
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(layer.eval()(x), x)
    # each place on its own: neighbors in a random word are independent
    drops = (y.detach().flatten() == 0).float()
    for lag in (1, 2, 3, 4):
        assert abs(float((drops[lag:] * drops[:-lag]).mean()) - p * p) < 0.005


def test_dropout_follows_the_seed() -> None:
    layer, x, draws = Dropout(0.3), torch.ones(1_000), []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(layer(x))
    assert torch.equal(*draws)


@pytest.mark.parametrize("kind", [None, "bool", "float"])
def test_attention_with_dropout_equals_its_definition(kind: str | None) -> None:
    q, k, v = (torch.randn(2, 3, t, 8, requires_grad=True) for t in (11, 13, 13))
    bias = None
    if kind == "bool":
        bias = torch.ones(2, 1, 1, 13, dtype=torch.bool)
        bias[1, ..., 9:] = False
    elif kind == "float":
        bias = torch.randn(2, 3, 11, 13, requires_grad=True)
    torch.manual_seed(3)
    y = attention(q, k, v, bias, 0.4)
    torch.manual_seed(3)
    signs, scales = zip(*(keep_signs(torch.Size((11, 13)), 0.4) for _ in range(6)))
    dropped = torch.stack(signs).view(2, 3, 11, 13) < 0
    score = q @ k.transpose(-1, -2) / 8**0.5
    if bias is not None:
        score = score.masked_fill(~bias, float("-inf")) if kind == "bool" else score + bias
    expected = (score.softmax(-1).masked_fill(dropped, 0.0) * scales[0]) @ v
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    wanted = [q, k, v] + ([bias] if kind == "float" else [])
    weight = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, wanted, weight), torch.autograd.grad(expected, wanted, weight)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_widened_heads_change_nothing() -> None:
    """The form for a GPU, here on a CPU."""
    q, k, v = (torch.randn(2, 3, 7, 36, requires_grad=True) for _ in range(3))
    biases = torch.randn(2, 3, 7, 7, requires_grad=True), torch.rand(2, 1, 1, 7) < 0.7
    biases[1][..., 0] = True
    for bias in biases:
        results = []
        for function in (_fused, attention):
            y = function(q, k, v, bias, 0.0)
            inputs = [x for x in (q, k, v, bias) if x.requires_grad]
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
