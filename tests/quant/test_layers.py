"""One-bit linear layers and convolutions, against their definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hubert_eff.errors import UserError
from hubert_eff.quant import BinaryConv1d, BinaryLinear
from hubert_eff.quant.functional import weight_signs

from ..helpers.simulated import masked_by


def test_weights() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [-2.0, 0.0, 2.0]], requires_grad=True)  # e = 1, mean |W| = 10 / 6
    signs, size = weight_signs(weight, per_channel=False)
    assert signs.tolist() == [[-1, 1, 1], [-1, -1, 1]] and size.tolist() == pytest.approx([10 / 6])  # 1 is not above 1
    signs, size = weight_signs(weight, per_channel=True)
    assert signs.tolist() == [[-1, 1, 1], [-1, -1, 1]] and size.tolist() == pytest.approx([2.0, 4 / 3])
    g = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (signs * size.unsqueeze(1) * g).sum().backward()
    torch.testing.assert_close(weight.grad, g)  # handed on as it is, without clipping
    filters = torch.tensor([[[0.1, 0.2, 0.3]], [[-1.0, 2.0, -1.0]]])
    assert weight_signs(filters, True, groups=2)[0].tolist() == [[[1, 1, 1]], [[-1, 1, -1]]]  # a smoothing filter keeps its DC
    grouped = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[-1.0, -2.0], [-3.0, -4.0]]])
    assert weight_signs(grouped, True, groups=2)[0].tolist() == [[[-1, -1], [1, 1]], [[1, 1], [-1, -1]]]  # centered one by one


# -- layers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [True, False])
def test_linear_sums_integers_then_multiplies_once(per_channel: bool) -> None:
    layer = BinaryLinear(256, 32, per_channel=per_channel)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 50, 256)
    y = layer.train()(x)
    bits = torch.where(x > 0, 1, -1)
    signs = torch.where(layer.weight > layer.weight.mean(), 1, -1)
    sums = torch.einsum("btk,nk->btn", bits, signs)
    assert (sums == 0).float().mean() > 0.02  # ties, which another order of arithmetic breaks
    size = layer.weight.detach().abs().mean(1) if per_channel else layer.weight.detach().abs().mean()
    assert torch.equal(y.detach(), sums.float() * (layer.input.scale.detach() * size) + layer.bias.detach())


def test_linear_gradients_are_those_of_the_quantized_product() -> None:
    layer = BinaryLinear(6, 3).double()
    x = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    layer(x.detach())
    g = torch.randn(1, 4, 3, dtype=torch.float64)
    (layer(x) * g).sum().backward()
    scale, size = layer.input.scale.item(), layer.weight.detach().abs().mean(1)
    quantized = scale * torch.where(x.detach() > 0, 1.0, -1.0).double()
    weight = size[:, None] * torch.where(layer.weight.detach() > layer.weight.detach().mean(), 1.0, -1.0)
    of_input = g @ weight
    torch.testing.assert_close(layer.weight.grad, g[0].T @ quantized[0])
    torch.testing.assert_close(x.grad, of_input * (x.detach().abs() <= scale))
    torch.testing.assert_close(layer.input.scale.grad.item(), float((of_input * quantized).sum()) / scale / math.sqrt(24))
    torch.testing.assert_close(layer.input.move.grad, x.grad[0].sum(0))


@pytest.mark.parametrize(
    "channels, out, kernel, stride, groups", [(8, 12, 1, 1, 1), (8, 8, 5, 1, 8), (8, 4, 3, 1, 2), (6, 6, 5, 2, 6), (8, 8, 2, 2, 1)]
)
@pytest.mark.parametrize("signed", [True, False])
def test_convolution(channels: int, out: int, kernel: int, stride: int, groups: int, signed: bool) -> None:
    layer = BinaryConv1d(channels, out, kernel, stride=stride, groups=groups, signed=signed)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 13, channels)
    valid = torch.arange(13) < torch.tensor([[13], [7]])
    y = masked_by(layer, valid).train()(x)
    scale = layer.input.scale.detach()
    quantized = torch.where(x > 0, scale, -scale) if signed else torch.where(x > scale / 2, scale, torch.zeros(()))
    quantized = (quantized * valid.unsqueeze(-1)).mT
    signs, size = weight_signs(layer.weight.detach(), True, groups)
    left = kernel // 2 if stride == 1 else 0
    right = left if stride == 1 else max(0, kernel - stride + -13 % stride)
    reference = F.conv1d(F.pad(quantized, (left, right)), signs * size.view(-1, 1, 1), layer.bias, stride, groups=groups).mT
    assert y.shape == (2, -(-13 // stride), out)
    torch.testing.assert_close(y, reference)
    other = torch.where(valid.unsqueeze(-1), x, torch.randn_like(x))
    assert torch.equal(y, layer(other))


def test_impossible_convolutions_are_refused() -> None:
    with pytest.raises(UserError, match="groups=3 must divide"):
        BinaryConv1d(8, 8, 3, groups=3)
    with pytest.raises(UserError, match="kernel=4 must be odd"):
        BinaryConv1d(8, 8, 4)
