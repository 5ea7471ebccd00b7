"""Quantizers and their gradients, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hubert_eff.quant import Quantizer
from hubert_eff.quant.functional import FLOOR

from ..helpers.simulated import masked_by, ready


def gradients(quantizer: Quantizer, x: list[float], g: list[float]) -> tuple[list[float], list[float], float]:
    """y = scale * codes of x (1, 1, n), and the gradients of sum(g y) with respect to x and to the scale."""
    leaf = torch.tensor(x, dtype=torch.float64).view(1, 1, -1).requires_grad_()
    codes = quantizer(leaf)
    y = codes.values * codes.scale
    (y * torch.tensor(g, dtype=torch.float64)).sum().backward()
    return y.flatten().tolist(), leaf.grad.flatten().tolist(), quantizer.scale.grad.item()


# -- quantizers, against numbers worked out by hand ------------------------------------------------------------------------


def test_signed_one_bit() -> None:
    y, of_x, of_scale = gradients(ready(Quantizer(1, True), 0.5), [-2.0, -0.5, 0.0, 0.1, 0.5, 0.6], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert y == [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5]  # 0 is not above 0
    assert of_x == [0.0, 2.0, 4.0, 8.0, 16.0, 0.0]
    assert of_scale == pytest.approx((-1 - 2 - 4 + 8 + 16 + 32) / math.sqrt(6))


def test_signed_two_bits() -> None:
    # q = -3, -2, -0.8, 0.5, 1, 1.2 -> -2, -2, -1, 0 (half to even), 1, 1
    y, of_x, of_scale = gradients(ready(Quantizer(2, True), 0.5), [-1.5, -1.0, -0.4, 0.25, 0.5, 0.6], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert y == [-1.0, -1.0, -0.5, 0.0, 0.5, 0.5]
    assert of_x == [0.0, 2.0, 4.0, 8.0, 16.0, 0.0]
    assert of_scale == pytest.approx((1 * -2 + 2 * 0 + 4 * -0.2 + 8 * -0.5 + 16 * 0 + 32 * 1) / math.sqrt(6))


def test_unsigned_one_bit() -> None:
    # q = -0.2, 0, 0.5, 0.6, 1, 1.5
    y, of_x, of_scale = gradients(ready(Quantizer(1, False), 0.5), [-0.1, 0.0, 0.25, 0.3, 0.5, 0.75], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert y == [0.0, 0.0, 0.0, 0.5, 0.5, 0.5]  # a / 2 is not above a / 2
    assert of_x == [0.0, 2.0, 4.0, 8.0, 16.0, 0.0]
    assert of_scale == pytest.approx((4 * -0.5 + 8 * 0.4 + 16 * 0 + 32 * 1) / math.sqrt(6))


def test_unsigned_two_bits() -> None:
    # z = -0.1, q = 0, 0.2, 1.7, 3, 4.2 -> 0, 0, 2, 3, 3
    y, of_x, of_scale = gradients(ready(Quantizer(2, False), 0.5), [-0.1, 0.0, 0.75, 1.4, 2.0], [1.0, 2.0, 4.0, 8.0, 16.0])
    assert y == pytest.approx([-0.1, -0.1, 0.9, 1.4, 1.4])
    assert of_x == pytest.approx([1.0, 2.0, 4.0, 8.0, 0.0])
    assert of_scale == pytest.approx((2 * -0.2 + 4 * 0.3 + 16 * 3) / math.sqrt(5 * 3), abs=1e-12)


@pytest.mark.parametrize(("bits", "signed"), [(1, True), (2, True), (1, False), (2, False)])
def test_scale_gradient_is_the_derivative_where_all_is_saturated(bits: int, signed: bool) -> None:
    """Beyond the last step y is a constant times the scale, so a finite difference must agree with the stated gradient."""
    quantizer = ready(Quantizer(bits, signed), 0.25)
    x = torch.rand(2, 3, 5, dtype=torch.float64) + 5.0
    if signed:
        x *= torch.randn_like(x).sign()
    else:
        x[:, 0, 0] = 0.0  # the minimum z of both sequences
    g = torch.randn_like(x)

    def loss() -> Tensor:
        codes = quantizer(x)
        return (g * codes.values * codes.scale).sum()

    loss().backward()
    stated, step = quantizer.scale.grad.item(), 1e-3
    with torch.no_grad():
        quantizer.scale += step
        above = loss()
        quantizer.scale -= 2 * step
        below = loss()
    factor = math.sqrt(x.numel() * quantizer.levels)
    assert stated * factor == pytest.approx(float(above - below) / (2 * step))


def test_move_is_added_before_and_not_subtracted_after() -> None:
    quantizer = ready(Quantizer(1, True, (3,)), 0.5)
    with torch.no_grad():
        quantizer.move.copy_(torch.tensor([0.3, -0.3, 0.0]))
    x = torch.tensor([[[-0.2, 0.2, 0.1]]], dtype=torch.float64)
    assert quantizer(x).values.tolist() == [[[1.0, -1.0, 1.0]]]
    quantizer(x).values.sum().backward()
    assert quantizer.move.grad.tolist() == [2.0, 2.0, 2.0]  # 1 / scale: the product's factor is the caller's


def test_scale_starts_from_the_valid_frames_of_the_first_training_batch() -> None:
    x = torch.randn(2, 6, 4)
    valid = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    kept = x[valid]
    for signed, bits, expected in ((True, 1, 2.0), (True, 2, 2.0), (False, 1, 4.0), (False, 2, 4.0 / math.sqrt(3))):
        quantizer = masked_by(Quantizer(bits, signed), valid)
        quantizer.eval()(x)
        assert not quantizer.initialized and quantizer.scale.item() == 1.0
        noisy = torch.where(valid.unsqueeze(-1), x, 1e3)
        quantizer.train()(noisy)
        assert quantizer.initialized and quantizer.scale.item() == pytest.approx(expected * float(kept.abs().mean()), rel=1e-5)
        started = quantizer.scale.item()
        quantizer(10 * x)
        assert quantizer.scale.item() == started
        again = Quantizer(bits, signed)
        again.load_state_dict(quantizer.state_dict())
        again.train()(10 * x)
        assert again.scale.item() == started


def test_gradient_of_a_scale_leaves_padding_out() -> None:
    x = torch.randn(1, 8, 4)
    short, long = Quantizer(1, True), Quantizer(1, True)
    short(x[:, :5]).scale.sum().backward()
    masked_by(long, torch.arange(8).view(1, 8) < 5)(x).scale.sum().backward()
    assert long.scale.grad.item() == pytest.approx(short.scale.grad.item()) == pytest.approx(1 / math.sqrt(20))


def test_scale_has_a_floor_that_it_can_leave() -> None:
    quantizer = ready(Quantizer(1, True), -1.0)
    codes = quantizer(torch.randn(1, 2, 3, dtype=torch.float64))
    assert codes.scale.item() == FLOOR
    codes.scale.sum().backward()
    assert quantizer.scale.grad.item() > 0
    small, zeros = Quantizer(1, True), Quantizer(1, True)
    small(torch.full((1, 2, 3), 1e-7))
    zeros(torch.zeros(1, 2, 3))
    assert small.scale.item() == pytest.approx(FLOOR) and zeros.scale.item() == 1.0 and zeros.initialized  # 0 says nothing about a scale
