"""The positional convolution in inference: through spectra, by blocks, the same numbers as the convolution of training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from hubert_eff.layers import choice, position
from hubert_eff.layers.position import PositionalConv1d


def convolution(dim: int = 48, kernel: int = 64, groups: int = 4, causal: bool = False) -> PositionalConv1d:
    module = PositionalConv1d(dim, kernel, groups, causal).eval()
    with torch.no_grad():
        module.weight_v.normal_(std=0.1)
        module.weight_g.uniform_(0.5, 1.5)
        module.bias.normal_()
    return module


def direct(module: PositionalConv1d, x: Tensor) -> Tensor:
    return copy.deepcopy(module).train()(x)


@pytest.fixture(autouse=True)
def _transforms() -> None:
    if not torch._C.has_spectral:
        pytest.skip("torch is built without Fourier transforms")


@pytest.mark.parametrize("dim, kernel, groups, causal", [(48, 64, 4, False), (48, 64, 4, True), (36, 128, 4, False), (64, 95, 1, False)])
@pytest.mark.parametrize("frames", [1, 64, 65, 66, 300])
@torch.no_grad()
def test_equals_the_convolution(dim: int, kernel: int, groups: int, causal: bool, frames: int) -> None:
    module, x = convolution(dim, kernel, groups, causal), torch.randn(3, frames, dim)
    assert choice.takes_spectrum(x, module.shape)
    torch.testing.assert_close(module(x), direct(module, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim, groups", [(32, 16), (36, 4), (144, 16), (48, 1)])
@torch.no_grad()
def test_no_bit_depends_on_length_or_batch(dim: int, groups: int) -> None:
    module = convolution(dim, 64, groups)
    x = torch.randn(5, 400, dim)
    together = module(x)
    for row, frames in ((0, 400), (1, 30), (2, 65), (3, 131), (4, 399)):
        padded = x[row : row + 1].clone()
        padded[:, frames:] = 0.0
        alone = module(padded[:, :frames])
        assert torch.equal(alone, module(padded)[:, :frames])
    assert torch.equal(together[3:4], module(x[3:4]))


def test_gradients_and_their_absence_give_the_same_bits() -> None:
    module, x = convolution(), torch.randn(2, 90, 48)
    with torch.no_grad():
        expected = module(x)
    parameters = [module.weight_v, module.weight_g, module.bias]
    inner = x.clone().requires_grad_()
    y = module(inner)
    assert torch.equal(y, expected)
    twin, outer = copy.deepcopy(module).train(), x.clone().requires_grad_()
    other = twin(outer)
    weight = torch.randn_like(y)
    found = torch.autograd.grad(y, [inner, *parameters], weight)
    wanted = torch.autograd.grad(other, [outer, twin.weight_v, twin.weight_g, twin.bias], weight)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_new_weights_are_noticed() -> None:
    module, x = convolution(), torch.randn(1, 70, 48)
    before = module(x)
    module.weight_g.mul_(2.0)
    torch.testing.assert_close(module(x) - module.bias, 2 * (before - module.bias), rtol=1e-4, atol=1e-4)
    module.train()
    module.weight_v.data.neg_()  # leaves no trace
    torch.testing.assert_close(module.eval()(x) - module.bias, -2 * (before - module.bias), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.fold()(x) - module.bias, -2 * (before - module.bias), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_training_and_other_forms_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("through spectra")

    monkeypatch.setattr(position, "convolve_blocks", refuse)
    module, x = convolution(), torch.randn(1, 70, 48)
    module.train()(x)
    module.eval().double()(x.double())
    PositionalConv1d(48, 31, 4).eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        convolution()(x)
    with pytest.raises(AssertionError, match="spectra"):
        convolution()(x)


@torch.no_grad()
def test_bfloat16_is_as_near_as_its_rounding() -> None:
    module, x = convolution(96, 64, 2), torch.randn(1, 100, 96)
    expected = module(x)
    found = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).norm() / expected.norm()) < 0.01


def test_the_spectrum_is_not_kept_with_the_module() -> None:
    module = convolution()
    with torch.no_grad():
        module(torch.randn(1, 70, 48))
    assert module in position._spectra and len(module.__getstate__()["_parameters"]) == 4
    assert copy.deepcopy(module) not in position._spectra
