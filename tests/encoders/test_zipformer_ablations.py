"""What the paper takes away from a Zipformer or exchanges: the default stays what it was, and every form trains, streams and is written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import hubert_eff
from hubert_eff.encoders.base import Frames
from hubert_eff.errors import UserError
from hubert_eff.exporting.onnx import export_onnx
from hubert_eff.layers import scaling
from hubert_eff.layers import zipformer as zipformer_layers
from hubert_eff.layers.scaling import Balancer, BiasNorm, Whitener
from hubert_eff.layers.zipformer import compact_positions, leave_out
from hubert_eff.optim import ScaledAdam
from hubert_eff.streaming import StreamingModel

from ..helpers.paths import ROOT

BEFORE = ROOT / "tests" / "data" / "zipformer_default.json"  # written by `figures` before there were ablations
NEW_KEYS = {
    "conv_embed", "zipformer_block", "zipformer_nonlinear_attention", "zipformer_share_weights", "zipformer_bypass", "zipformer_norm",
    "zipformer_activation", "zipformer_module_norm", "zipformer_balancer", "zipformer_whitener",
}  # fmt: skip
ABLATIONS: dict[str, dict[str, Any]] = {
    "conformer": {"zipformer_block": "conformer"},
    "no nonlinear attention": {"zipformer_nonlinear_attention": False},
    "weights not shared": {"zipformer_nonlinear_attention": False, "zipformer_share_weights": False},
    "no bypass": {"zipformer_bypass": False},
    "LayerNorm": {"zipformer_norm": "layer_norm"},
    "SwooshR": {"zipformer_activation": "swoosh_r"},
    "Swish": {"zipformer_activation": "swish"},
    "norm per module": {"zipformer_module_norm": True},
    "no Balancer": {"zipformer_balancer": False},
    "no Whitener": {"zipformer_whitener": False},
    "one rate": {"zipformer_rates": "1,1,1"},
    "all": {
        "zipformer_block": "conformer", "zipformer_bypass": False, "zipformer_norm": "layer_norm", "zipformer_activation": "swish",
        "zipformer_module_norm": True, "zipformer_balancer": False, "zipformer_whitener": False,
    },
}  # fmt: skip


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def figures() -> dict[str, Any]:
    """Names, draws and figures of a default Zipformer that is built, trained for one batch and run."""
    torch.manual_seed(7)
    model = hubert_eff.build("zipformer-debug", num_classes=(10,))
    found: dict[str, Any] = {"names": {name: list(p.shape) for name, p in model.named_parameters()}}
    # uniform draws are the same on every processor
    found["drawn"] = {n: digest(p) for n, p in model.named_parameters() if n.endswith(("in_proj.weight", "out_proj.bias"))}
    wav, padding = torch.rand(2, 8_000) - 0.5, torch.zeros(2, 8_000, dtype=torch.bool)
    padding[1, 5_000:] = True
    model.set_num_updates(100)
    out = model(wav, [torch.arange(48).view(2, 24) % 10], padding)
    loss = nn.functional.cross_entropy(out["logits_m"][0], out["targets_m"][0]) + out["features_pen"]
    loss.backward()
    found["draws"] = digest(torch.get_rng_state())
    found["loss"] = loss.item()
    found["gradients"] = {name: float(p.grad.norm()) for name, p in model.named_parameters()}
    with torch.no_grad():
        found["states"] = [float(state.square().mean()) for state in model.eval().hidden_states(wav, padding)[0]]
    return found


def test_the_default_is_what_it_was() -> None:
    """The same parameters under the same names, from the same draws; the same draws in training; the same loss, gradients and states."""
    before, now = json.loads(BEFORE.read_text(encoding="utf-8")), figures()
    assert list(now["names"].items()) == list(before["names"].items())
    assert (now["drawn"], now["draws"]) == (before["drawn"], before["draws"])
    assert now["loss"] == pytest.approx(before["loss"], rel=1e-4)
    assert now["states"] == pytest.approx(before["states"], rel=1e-3)
    assert now["gradients"] == pytest.approx(before["gradients"], rel=1e-2, abs=1e-5)


def test_a_model_stored_before_there_were_ablations_loads(tmp_path: Path) -> None:
    model = hubert_eff.build("zipformer-debug").eval()
    hubert_eff.export(model, tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", framework="pt") as stream:
        metadata, weights = stream.metadata(), {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    config = {key: value for key, value in json.loads(metadata["config"]).items() if key not in NEW_KEYS}
    assert len(config) == len(model.config.to_dict()) - len(NEW_KEYS)
    save_file(weights, tmp_path / "old.safetensors", {**metadata, "config": json.dumps(config)})
    wav = batch()[0]
    assert torch.equal(hubert_eff.load(tmp_path / "old.safetensors").hidden_states(wav)[0][-1], model.hidden_states(wav)[0][-1])


def batch() -> tuple[Tensor, list[Tensor], Tensor]:
    wav, padding = torch.rand(2, 8_000) - 0.5, torch.zeros(2, 8_000, dtype=torch.bool)
    padding[1, 5_000:] = True
    return wav, [torch.randint(0, 10, (2, 25))], padding


def loss_of(model: nn.Module) -> Tensor:
    wav, labels, padding = batch()
    out = model(wav, labels, padding)
    return nn.functional.cross_entropy(out["logits_m"][0], out["targets_m"][0])


def everyday(*names: str) -> list[Any]:
    """All ablations, of which these are tried every day."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.long) for name in ABLATIONS]


@pytest.mark.parametrize("name", everyday("weights not shared", "norm per module", "all"))
def test_every_form_trains_streams_and_folds(name: str, tmp_path: Path) -> None:
    """Some updates by Adam and by ScaledAdam; what is written reads back; a stream is the masked pass; padding is sealed."""
    torch.manual_seed(0)
    model = hubert_eff.build("zipformer-debug", num_classes=(10,), dropout=0.0, **ABLATIONS[name])
    for optimizer in (torch.optim.Adam(model.parameters(), 1e-3), ScaledAdam(model.parameters(), lr=0.01)):
        before = [p.detach().clone() for p in model.parameters()]
        for update in (0, 2_000, 60_000):
            model.set_num_updates(update)
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
            optimizer.step()
        assert torch.isfinite(loss) and not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    model.eval()
    wav, _, padding = batch()
    hubert_eff.export(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        states, frames = model.hidden_states(wav, padding)
        again = hubert_eff.load(tmp_path / "model.safetensors").hidden_states(wav, padding)[0]
        alone = model.hidden_states(wav[1:, :5_000])[0]
        folded = hubert_eff.fuse(model).hidden_states(wav, padding)[0]
    valid = int((~frames[1]).sum())
    for state, stored, row, fused in zip(states, again, alone, folded, strict=True):
        assert torch.equal(state, stored)
        torch.testing.assert_close(state[1, :valid], row[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fused, state, rtol=1e-4, atol=1e-5)
    stream = hubert_eff.build("zipformer-debug", streaming=True, **ABLATIONS[name]).eval()
    fed = StreamingModel(stream, 8, 2)
    with torch.no_grad():
        parts = [y for y in (fed.feed(wav[:1, :3_000]), fed.feed(wav[:1, 3_000:]), fed.flush()) if y is not None]
        right = stream.hidden_states(wav[:1], chunk_size=8, left_chunks=2)[0][-1]
    torch.testing.assert_close(torch.cat(parts, 1), right, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", everyday("weights not shared"))
def test_every_form_has_an_onnx_graph_and_one_of_bits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'hubert-eff[onnx]'")
    torch.manual_seed(0)
    model = hubert_eff.build("zipformer-debug", num_classes=(10,), **ABLATIONS[name])
    assert export_onnx(model, tmp_path / "model.onnx")["difference"] < 1e-4
    binary = hubert_eff.binarize(model.train(), "w1a1")
    loss_of(binary).backward()
    assert all(p.grad is not None for n, p in binary.named_parameters() if "encoder.layers" in n)
    wav, _, padding = batch()
    binary.eval()
    with torch.no_grad():
        assert torch.equal(hubert_eff.quant.pack(binary).hidden_states(wav, padding)[0][-1], binary.hidden_states(wav, padding)[0][-1])


def test_what_is_left_out_is_not_there() -> None:
    def blocks(**keys: Any) -> nn.ModuleList:
        return hubert_eff.build("zipformer-debug", **keys).encoder.layers

    def count(kind: type, **keys: Any) -> int:
        return sum(isinstance(m, kind) for m in blocks(**keys).modules())

    assert count(Balancer) and count(Whitener) and count(BiasNorm) == 3
    assert count(Balancer, zipformer_balancer=False) == 0 and count(Whitener, zipformer_balancer=False) == count(Whitener)
    assert count(Whitener, zipformer_whitener=False) == 0
    assert count(BiasNorm, zipformer_norm="layer_norm") == 0 and count(nn.LayerNorm, zipformer_norm="layer_norm") == 3
    assert isinstance(hubert_eff.build("zipformer-debug", zipformer_norm="layer_norm").encoder.layer_norm, nn.LayerNorm)
    assert (
        count(BiasNorm, zipformer_module_norm=True) == 3 * 10
        and count(BiasNorm, zipformer_module_norm=True, zipformer_block="conformer") == 36
    )
    for name, left, right in (("swoosh_r", "swoosh_r", "swoosh_r"), ("swish", "silu", "silu"), ("swoosh", "swoosh_l", "swoosh_r")):
        block = blocks(zipformer_activation=name)[0]
        assert (block.feed_forward2.activation.__name__, block.conv_module1.activation.__name__) == (left, right)
    x = torch.randn(1, 5, 48)
    block = blocks(zipformer_bypass=False)[0].eval()
    seen: dict[str, Tensor] = {}
    block.norm.register_forward_hook(lambda m, i, out: seen.update(y=out))
    assert torch.equal(block(x, Frames(positions=compact_positions(5, 24, x))), seen["y"])
    leave_out(block, BiasNorm)
    assert not any(isinstance(m, BiasNorm) for m in block.modules())


def test_without_balancers_and_whiteners_no_gradient_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    for module in (scaling, zipformer_layers):
        monkeypatch.setattr(module, "chance", lambda rate: bool(rates.append(rate)))
    encoder = hubert_eff.build("zipformer-debug", zipformer_balancer=False, zipformer_whitener=False).encoder
    encoder.layers[1](torch.randn(1, 5, 64, requires_grad=True), Frames(positions=compact_positions(5, 24, torch.empty(()))))
    assert sorted(rates) == pytest.approx([0.0, 0.1, 0.6, 0.6, 0.6])  # positions, the penalty on scores, limits on parameters


def test_conformer_style_block_is_the_sum_of_its_modules() -> None:
    torch.manual_seed(0)
    pair = hubert_eff.build("zipformer-debug", zipformer_block="conformer").encoder.layers[0].eval()
    x = torch.randn(2, 7, 48)
    frames = Frames(positions=compact_positions(7, 24, x))
    with torch.no_grad():
        right = x
        for block in (pair.first, pair.second):
            y = right + block.feed_forward1(right) / 2
            y = y + block.self_attn(y, block.self_attn_weights(y, frames.positions))
            y = y + block.conv_module(y)
            y = block.norm(y + block.feed_forward2(y) / 2)
            right = right + (y - right) * block.bypass.bypass_scale
        torch.testing.assert_close(pair(x, frames), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"zipformer_block": "conformer", "zipformer_nonlinear_attention": False}, "contradicts zipformer_block=conformer"),
        ({"zipformer_block": "conformer", "zipformer_share_weights": False}, "zipformer_share_weights=false contradicts"),
        ({"zipformer_share_weights": False}, "set zipformer_nonlinear_attention=false, as the paper does"),
        ({"zipformer_norm": "batch_norm"}, "unknown value of zipformer_norm"),
        ({"zipformer_activation": "gelu"}, "unknown value of zipformer_activation"),
        ({"conv_embed": "authors"}, "does nothing with conv_feature_layers=.*set conv_feature_layers=conv-embed"),
        ({"conv_embed": "icefall", "conv_feature_layers": "conv-embed"}, "unknown value of conv_embed"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused_in_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        hubert_eff.build("zipformer-debug", **keys)
    assert "\n" not in str(caught.value)
