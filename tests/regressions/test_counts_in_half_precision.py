"""float16 ends at 65,504: the gradient of a scale was 0 where its quantizer saw more elements, since their number became infinite.

The same for other counts, sums over frames and sums of squares.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hubert_eff
from hubert_eff.layers.grid import GridNorm
from hubert_eff.layers.norm import MaskedBatchNorm
from hubert_eff.layers.scaling import Balancer, BiasNorm, Whitener, whitening_metric
from hubert_eff.layers.sparse import SparsePattern
from hubert_eff.layers.zipformer import NonlinearAttention
from hubert_eff.models.hubert import normalize_waveform
from hubert_eff.optim.scaled_adam import ScaledAdam
from hubert_eff.quant import BinaryConv1d, BinaryLinear, Quantizer
from hubert_eff.quant.attention import BinaryAttention, BinaryMix, BinarySparseAttention, BinaryWeights
from hubert_eff.quant.distill import codebook_divergence, hidden_distances

HALVES = torch.float16, torch.bfloat16
PRECISION = {torch.float16: 0.004, torch.bfloat16: 0.03}  # a few roundings


def off(found: Tensor, right: Tensor) -> float:
    return float(((found.double() - right.double()).norm() / right.double().norm()).detach())


def compared(
    module: nn.Module, call: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype, part: str = "", margin: float = 0.0
) -> list[str]:
    """Compare a module in half precision with the same weights and inputs in float32: output and gradients of parameters named `part`.

    margin: what bits cost that rounding sets the other way. Returns the names.
    """
    module = module.to(dtype)
    inputs = [x.to(dtype) for x in inputs]
    with torch.no_grad():
        call(module, *inputs)  # scales start
    exact = copy.deepcopy(module).float()
    torch.manual_seed(0)
    right = call(exact, *[x.float() for x in inputs])
    (right - 0.5).square().sum().mul(0.001).backward()
    torch.manual_seed(0)
    found = call(module, *inputs)
    assert found.dtype == dtype and off(found, right) < PRECISION[dtype] + margin
    (found.float() - 0.5).square().sum().mul(0.001).backward()
    theirs = dict(exact.named_parameters())
    names = [name for name, p in module.named_parameters() if p.grad is not None and name.endswith(part)]
    for name in names:
        ours, wanted = module.get_parameter(name).grad, theirs[name].grad
        assert ours.dtype == dtype and bool((wanted != 0).all()), name
        assert off(ours, wanted) < 4 * PRECISION[dtype] + margin, (name, ours, wanted)
    return names


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("signed", [True, False])
def test_scales_of_layers(bits: int, signed: bool) -> None:
    x = torch.randn(2, 300, 160)  # 96,000 elements
    x = x if signed else x.relu()
    for dtype in HALVES:
        for layer in (
            BinaryLinear(160, 24, bits=bits, signed=signed),
            BinaryConv1d(160, 160, 5, groups=160, bits=bits, signed=signed),
        ):
            assert x.numel() > torch.finfo(torch.float16).max
            assert compared(layer, lambda layer, x: layer(x), [x], dtype, "scale") == ["input.scale"]


def test_the_gradient_of_a_scale_is_summed_before_it_is_rounded() -> None:
    """The sum over all elements does not fit into float16; divided by the root of their number it does."""
    layer = BinaryLinear(256, 8, bias=False).half().train()
    x = torch.ones(1, 400, 256, dtype=torch.float16)
    layer(x).float().sum().mul(1024.0).backward()
    exact = copy.deepcopy(layer).float()
    exact.zero_grad()
    exact(x.float()).sum().mul(1024.0).backward()
    assert float(exact.input.scale.grad.abs()) * x.numel() ** 0.5 > 65_504
    assert off(layer.input.scale.grad, exact.input.scale.grad) < 0.002


def test_scales_of_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 150, 128) for _ in range(3))  # 76,800 elements each, 90,000 probabilities
    forms = [
        (BinaryAttention(1, {}), lambda form, q, k, v: form(q, k, v, None, 0.0)),
        (BinarySparseAttention(1, {}), partial(sparse, SparsePattern("fixed", 16, 4, 0))),
    ]
    for module, call in forms:
        names = compared(module, call, [q, k, v], torch.float16, "scale", margin=0.05)
        assert names == ["query.scale", "key.scale", "value.scale", "probabilities.quantizer.scale"]
    shared = nn.ModuleDict({"weights": BinaryWeights(1, {}), "mix": BinaryMix(1, {})})
    assert len(compared(shared, mixed, [q / 12, k, q[..., :4], torch.randn(2, 299, 4), v], torch.float16, "scale", margin=0.05)) == 6


def sparse(pattern: SparsePattern, form: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return form(q, k, v, None, 0.0, pattern)


def mixed(form: Any, q: Tensor, k: Tensor, p: Tensor, offsets: Tensor, v: Tensor) -> Tensor:
    return form["mix"](v, form["weights"](q, k, p, offsets, None, 0.0))


@pytest.mark.parametrize("encoder", ["sparseformer", "zipformer"])
def test_no_scale_of_a_model_stands_still(encoder: str) -> None:
    model = hubert_eff.build(f"{encoder}-debug", quant="w1a1", encoder_layerdrop=0.0).half().train()
    x, padding = torch.randn(3, 500, model.config.input_dim).half(), torch.zeros(3, 500, dtype=torch.bool)
    padding[1, 450:] = True
    wanted = 3 * torch.randn(model.encoder(x, padding).size(-1))  # by channel: a last norm fixes the distance from a constant
    ((model.encoder(x, padding).float() - wanted).square().sum() * 0.1).backward()
    scales = {name: q.scale.grad for name, q in model.encoder.named_modules() if isinstance(q, Quantizer)}
    assert len(scales) >= 16 and all(bool(g.isfinite().all()) and bool((g != 0).any()) for g in scales.values())


def test_norms() -> None:
    loud, valid = 400 * torch.randn(2, 300, 12) + 300.0, torch.ones(2, 300, dtype=torch.bool)  # squares do not fit into float16
    valid[1, 250:] = False
    assert "bias" in compared(BiasNorm(12), lambda norm, x: norm(x), [loud], torch.float16)
    for mask in (None, valid):
        norm = MaskedBatchNorm(12)
        compared(norm, lambda norm, x, mask=mask: norm(x, mask) * (1 if mask is None else mask.unsqueeze(-1)), [loud], torch.float16)
        assert off(norm.running_mean, 0.19 * loud[slice(None) if mask is None else mask].view(-1, 12).mean(0)) < 0.002  # two updates
    grid = GridNorm(nn.LayerNorm(12)).half()
    right = nn.functional.layer_norm(loud.half().float(), (12,))
    assert off(grid(loud.half().mT.unsqueeze(2)).squeeze(2).mT, right) < 0.002
    wav, padding = torch.randn(2, 80_000), torch.zeros(2, 80_000, dtype=torch.bool)
    padding[0, 70_000:] = True
    wav = (wav + 2.0).half()
    assert off(normalize_waveform(wav, padding), normalize_waveform(wav.float(), padding)) < 0.002


@torch.no_grad()
def test_means_over_many_frames() -> None:
    layer = NonlinearAttention(8).half().eval()
    x, seen = torch.randn(1, 70_000, 8).half() + 1, torch.ones(1, 1, 70_000, dtype=torch.bool)
    mean = [module(x.to(module.out_proj.weight.dtype), None, None, seen, uniform=True) for module in (layer, copy.deepcopy(layer).float())]
    assert off(*mean) < 0.01


@pytest.mark.parametrize("modifier", [Balancer((0.45, 0.55), (0.2, 0.5), rate=1.0), Whitener(1.2, 0.5)])
def test_gradient_modifiers(modifier: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubert_eff.layers.scaling.chance", lambda rate: True)
    x = (300 * torch.randn(2, 400, 6) @ torch.randn(6, 6)).half()
    grads = []
    for dtype, mixed in ((torch.float32, False), (torch.float16, False), (torch.float32, True)):
        leaf = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):  # of the backward pass, too
            modifier.train()(leaf).backward(torch.ones_like(leaf))
        grads.append(leaf.grad)
    assert off(grads[1], grads[0]) < 0.002 and torch.equal(grads[2], grads[0]) and off(grads[0], torch.ones_like(x)) > 0.01
    assert 1.0 < float(whitening_metric(x)) < 6.0


def test_losses() -> None:
    ours, theirs = (100 * torch.randn(2, 500, 80) for _ in range(2))
    for dtype in HALVES:
        states = [[x.to(dtype)] for x in (ours, theirs)]
        wide = [[x.float() for x in part] for part in states]
        assert torch.equal(hidden_distances(*states, None), hidden_distances(*wide, None))
        assert torch.equal(codebook_divergence(states[0], states[1]), codebook_divergence(wide[0], wide[1]))


def test_scaled_adam() -> None:
    start, grads = 3 * torch.randn(300, 300).half(), 300 * torch.randn(8, 300, 300).half()  # 90,000 elements
    params = [nn.Parameter(start.to(dtype, copy=True)) for dtype in (torch.float16, torch.float32)]
    for param in params:
        optimizer = ScaledAdam([param], lr=0.05)
        for grad in grads:
            param.grad = grad.to(param.dtype)
            optimizer.step()
    assert off(params[0] - start, params[1] - start) < 0.02
