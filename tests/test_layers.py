"""Layers that replace one of torch: same numbers."""

from __future__ import annotations

import pytest
import torch

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
