"""Layers that replace one of torch: same numbers."""

from __future__ import annotations

import pytest
import torch

from hubert_eff.frontend import TimeNorm
from hubert_eff.layers.convolution import strided_conv
from hubert_eff.layers.linear import Linear


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
