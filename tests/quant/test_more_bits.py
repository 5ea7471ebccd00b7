"""W1A4 and W1A8: activations of more bits, and what a model with them can and cannot do."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import hubert_eff
from hubert_eff.checkpoints.open import open_model
from hubert_eff.errors import UserError
from hubert_eff.profiling.cost import bit_operations
from hubert_eff.quant import Quantizer, pack, quant_report
from hubert_eff.quant.distill import start_from

from ..helpers.simulated import ENCODERS, batch, debug, ready

SPECS = {"w1a4": 4, "w1a8": 8}


def gradients(quantizer: Quantizer, x: list[float], g: list[float]) -> tuple[list[float], list[float], float]:
    """y, dL/dx and dL/da for the gradient g of y."""
    leaf = torch.tensor(x, dtype=torch.float64).view(1, 1, -1).requires_grad_()
    codes = quantizer(leaf)
    y = codes.values * codes.scale
    (y * torch.tensor(g, dtype=torch.float64)).sum().backward()
    return y.flatten().tolist(), leaf.grad.flatten().tolist(), quantizer.scale.grad.item()


def test_signed_four_bits_by_hand() -> None:
    # q = -9, -8, -2.4, 0.5, 7, 7.2 -> -8, -8, -2, 0 (half to even), 7, 7
    y, of_x, of_scale = gradients(ready(Quantizer(4, True), 0.5), [-4.5, -4.0, -1.2, 0.25, 3.5, 3.6], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert y == [-4.0, -4.0, -1.0, 0.0, 3.5, 3.5]
    assert of_x == [0.0, 2.0, 4.0, 8.0, 16.0, 0.0]
    assert of_scale == pytest.approx((1 * -8 + 2 * 0 + 4 * 0.4 + 8 * -0.5 + 16 * 0 + 32 * 7) / math.sqrt(6 * 7))


def test_unsigned_eight_bits_by_hand() -> None:
    # z = -0.5, q = 0, 1.2, 255, 256 -> 0, 1, 255, 255
    y, of_x, of_scale = gradients(ready(Quantizer(8, False), 0.5), [-0.5, 0.1, 127.0, 127.5], [1.0, 2.0, 4.0, 8.0])
    assert y == pytest.approx([-0.5, 0.0, 127.0, 127.0])
    assert of_x == pytest.approx([1.0, 2.0, 4.0, 0.0])
    assert of_scale == pytest.approx((2 * -0.2 + 4 * 0 + 8 * 255) / math.sqrt(4 * 255), abs=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_scales_start_by_the_number_of_steps(bits: int) -> None:
    x = torch.randn(2, 6, 4)
    signed, unsigned = Quantizer(bits, True), Quantizer(bits, False)
    signed(x), unsigned(x.abs())
    steps = max(1, 2 ** (bits - 1) - 1)
    assert signed.scale.item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(steps))
    assert unsigned.scale.item() == pytest.approx(4 * x.abs().mean().item() / math.sqrt(2**bits - 1))


@pytest.mark.parametrize("signed", [True, False])
def test_more_bits_are_nearer_to_what_they_stand_for(signed: bool) -> None:
    x = torch.randn(2, 50, 8)
    x = x if signed else x.relu()
    errors = []
    for bits in (2, 4, 8):
        codes = Quantizer(bits, signed)(x)
        errors.append(float((codes.values * codes.scale - x).detach().square().mean()))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_scales_of_four_bits_train_in_every_encoder(encoder: str) -> None:
    model, (wav, padding) = debug(encoder, "w1a4"), batch()
    model.train().hidden_states(wav, padding)[0][-1].square().sum().backward()
    grads = {name: m.scale.grad for name, m in model.named_modules() if isinstance(m, Quantizer) and m.scale.grad is not None}
    assert len(grads) >= 10 and all(bool(g.isfinite().all()) and bool((g != 0).all()) for g in grads.values())


@pytest.mark.parametrize("spec", SPECS)
def test_a_model_with_them_is_named_profiled_and_exported_and_not_packed(spec: str, tmp_path: Path) -> None:
    bits = SPECS[spec]
    model = open_model(f"conformer-debug+{spec}@3")
    profile, one = hubert_eff.profile(model, seconds=1.0), hubert_eff.profile(open_model("conformer-debug+w1a1@3"), seconds=1.0)
    both = {pair for pair in profile.macs_by_bits if pair != (32, 32)}
    assert both == {(1, bits), (bits, bits)} and sum(profile.macs_by_bits.values()) == sum(one.macs_by_bits.values())
    weights, products = profile.macs_by_bits[1, bits], profile.macs_by_bits[bits, bits]
    assert bit_operations(profile.macs_by_bits, "paper")[1] == pytest.approx(bits * (weights + products) / 2**30)
    assert bit_operations(profile.macs_by_bits, "product")[1] == pytest.approx((bits * weights + bits**2 * products) / 2**30)
    assert profile.storage_mb == one.storage_mb
    assert f"1 x {bits} bit, signed input" in {row["becomes"] for row in quant_report(model)}
    hubert_eff.export(model, tmp_path / "model.safetensors")
    again = hubert_eff.load(tmp_path / "model.safetensors")
    wav, padding = batch()
    assert again.config.quant == spec and torch.equal(again.hidden_states(wav, padding)[0][-1], model.hidden_states(wav, padding)[0][-1])
    with pytest.raises(UserError, match=f"activations of {bits} bits cannot be packed: only w1a1 models run from bits") as caught:
        pack(model)
    assert "\n" not in str(caught.value)


def test_scales_of_other_bits_are_not_taken_over() -> None:
    eight, four, two, one = (debug("conformer", spec) for spec in ("w1a8", "w1a4", "w1a2", "w1a1"))
    fresh = {name: m.scale.item() for name, m in four.named_modules() if isinstance(m, Quantizer)}
    eight.train().hidden_states(*batch())
    with torch.no_grad():
        for parameter in eight.parameters():
            parameter.add_(0.01)
    start_from(four, eight)
    assert {name: m.scale.item() for name, m in four.named_modules() if isinstance(m, Quantizer)} == fresh
    assert not four.encoder.layers[0].ffn1.w_1.input.initialized
    others = [name for name in four.state_dict() if not name.endswith(("scale", "initialized"))]
    assert all(torch.equal(four.state_dict()[name], eight.state_dict()[name]) for name in others)
    two.train().hidden_states(*batch())
    start_from(one, two)
    assert one.encoder.layers[0].ffn1.w_1.input.scale.item() == two.encoder.layers[0].ffn1.w_1.input.scale.item()


# -- dropout of attention --------------------------------------------------------------------------------------------------


def bits_set(policy: object) -> tuple[float, float, torch.Tensor]:
    """Share of a fresh model's attention bits that are set, in training with dropout and in evaluation; values that training mixes by."""
    torch.manual_seed(0)
    model = hubert_eff.build("transformer-debug", attention_dropout=0.25, dropout=0.0)
    model = hubert_eff.binarize(model, "w1a1", policy)
    wav, _ = batch()
    model.train().hidden_states(wav)
    probabilities = model.encoder.layers[0].self_attn.products.probabilities
    shares, values = [], []
    probabilities.register_forward_hook(lambda module, args, codes: values.append(codes.detach()))
    for mode in (True, False):
        model.train(mode)
        probabilities.quantizer.watch = lambda x, codes, *_: shares.append(codes.mean().item())
        model.hidden_states(wav)
    return shares[0], shares[1], values[0].unique()


def test_dropout_of_attention_leaves_the_threshold_alone_unless_a_policy_says_so() -> None:
    training, evaluation, values = bits_set("default")
    assert training == pytest.approx(evaluation, abs=0.02)
    assert values.tolist() == pytest.approx([0.0, 4 / 3])
    training, _, values = bits_set({"attention_dropout": "probabilities"})  # as BiT
    assert training > evaluation + 0.1 and values.tolist() == [0.0, 1.0]
    with pytest.raises(UserError, match="unknown value of attention_dropout"):
        bits_set({"attention_dropout": "scores"})


# -- half precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
def test_scales_of_two_blocks_of_sparseformer_dn_train_under_autocast(dtype: torch.dtype) -> None:
    model = hubert_eff.build("sparseformer-dn-s+w1a1", encoder_layers=2, encoder_layerdrop=0.0).train()
    x = torch.randn(2, 200, 256)  # 102,400 elements: more than float16 holds
    with torch.autocast("cpu", dtype):
        model.encoder(x)
        loss = 2**10 * (model.encoder(x).float() - torch.randn(2, 200, 256)).square().mean()  # scaled, as training in float16 does
    loss.backward()
    grads = [m.scale.grad for m in model.modules() if isinstance(m, Quantizer)]
    assert len(grads) == 16 and all(g.dtype == torch.float32 and bool(g.isfinite().all()) and bool((g != 0).all()) for g in grads)
