"""int8 without training: what it computes, what a file holds of it, and that no frame depends on another."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hubert_eff
from hubert_eff.checkpoints.safetensors import read_metadata
from hubert_eff.cli import main
from hubert_eff.edge import rewrite
from hubert_eff.errors import UserError
from hubert_eff.layers.linear import Linear
from hubert_eff.quant.quantization import is_int8
from hubert_eff.quant.runtime import int8
from hubert_eff.quant.runtime.int8 import DYNAMIC, FLOAT, Int8Linear
from hubert_eff.streaming.stream import StreamingModel

from ..helpers.streams import cut_at_random, fed, reference, streaming_model

ENGINES = set(torch.backends.quantized.supported_engines) - {"none"}


@pytest.fixture(params=["here", DYNAMIC, FLOAT])
def kernel(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The product that this processor takes, and those that others do."""
    if request.param == DYNAMIC and not ENGINES:
        pytest.skip("this torch has no dynamic quantization")
    chosen = int8.kernel() if request.param == "here" else request.param
    monkeypatch.setattr(int8, "kernel", lambda: chosen)
    return chosen


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_its_float_layer_but_for_eight_bits(kernel: str, dtype: torch.dtype) -> None:
    """Weights laid out by output or, as `fuse` leaves them, by input; rows of very different sizes, one of zeros."""
    torch.manual_seed(0)
    for bias in (True, False):
        layer = Linear(96, 80, bias=bias).to(dtype)
        x = (torch.randn(2, 9, 96) * torch.logspace(-3, 3, 9).unsqueeze(-1)).to(dtype)
        x[0, 4] = 0
        expected = layer(x)
        for source in (layer, copy.deepcopy(layer).fold()):
            y = Int8Linear(source)(x)
            assert y.dtype == dtype and y.shape == expected.shape
            error = (y - expected).float().norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-6)
            assert error.max() < (0.06 if kernel == DYNAMIC else 0.03)
    assert Int8Linear(layer)(x[:, :0]).shape == (2, 0, 80)


@torch.no_grad()
@pytest.mark.parametrize("encoder", hubert_eff.list_encoders())
def test_every_encoder_keeps_its_padding_apart_and_comes_back_from_a_file(encoder: str, tmp_path: Path) -> None:
    model, path = hubert_eff.build(f"{encoder}-debug").eval(), tmp_path / "model.safetensors"
    small = hubert_eff.quantize(model)
    assert is_int8(small) and not is_int8(model) and not any(isinstance(m, nn.Linear) for m in small.encoder.modules())
    wav, padding = torch.randn(2, 12_000), torch.zeros(2, 12_000, dtype=torch.bool)
    padding[1, 7_000:] = True
    batch = small.hidden_states(wav, padding)[0]
    for state, expected in zip(batch, model.hidden_states(wav, padding)[0], strict=True):
        assert (state - expected).norm() < 0.03 * expected.norm()
    alone = small.hidden_states(wav[1:, :7_000])[0][-1]
    assert (batch[-1][1, : alone.size(1)] - alone[0]).norm() < 2e-3 * alone.norm()  # float rounding, and a code that it tips over
    hubert_eff.export(model, path, dtype="int8")
    loaded = hubert_eff.load(path)
    for state, expected in zip(loaded.hidden_states(wav, padding)[0], batch, strict=True):
        assert torch.equal(state, expected)
    again = tmp_path / "again.safetensors"
    hubert_eff.export(loaded, again)
    first, second = load_file(path), load_file(again)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert read_metadata(path)["weights"] == "int8"


@pytest.mark.parametrize("encoder", ["conformer", "fusionformer"])
def test_a_stream_is_its_masked_full_pass(encoder: str) -> None:
    """But for codes that rounding tips over: one step of 1 / 127 of a frame's largest number."""
    model = hubert_eff.quantize(streaming_model(f"{encoder}-debug"))
    wav = torch.randn(1, 16_077)
    expected = reference(model, wav, 16, 1)
    stream = fed(StreamingModel(model, 16, 1), cut_at_random(wav, 3_000))
    assert (stream - expected).norm() < 2e-3 * expected.norm()


def test_a_profile_counts_eight_bits() -> None:
    model = hubert_eff.build("conformer-debug")
    before, after = hubert_eff.profile(model, 1.0), hubert_eff.profile(hubert_eff.quantize(model), 1.0)
    layers = [m for m in hubert_eff.fuse(model).encoder.modules() if isinstance(m, nn.Linear)]
    weights, outputs = sum(m.weight.numel() for m in layers), sum(m.out_features for m in layers)
    assert after.macs == before.macs and 0 < after.macs_by_bits[8, 8] < after.macs
    fused = hubert_eff.profile(hubert_eff.fuse(model), 1.0)
    assert after.params == fused.params
    assert after.storage_mb["file"] * 1e6 == pytest.approx(fused.storage_mb["file"] * 1e6 - 3 * weights + 4 * outputs)


def test_what_cannot_be_quantized_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    binary = hubert_eff.binarize(hubert_eff.build("conformer-debug"))
    with pytest.raises(UserError, match="this one is binarized .*or quantize the float checkpoint"):
        hubert_eff.quantize(binary)
    with pytest.raises(UserError, match="int4"):
        hubert_eff.quantize(hubert_eff.build("conformer-debug"), "int4")
    with pytest.raises(UserError, match="quantize the model that was rewritten"):
        hubert_eff.quantize(rewrite(hubert_eff.build("conformer-debug").eval()))
    out = str(tmp_path / "model.safetensors")
    assert main(["export", "conformer-debug+w1a1", "--dtype", "int8", "--out", out]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["export", "conformer-debug", "--dtype", "int8", "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "int8"
    assert "int8 weights" in (tmp_path / "model.md").read_text()
    with pytest.raises(UserError, match="int8 layers have no ONNX form"):
        from hubert_eff.exporting.onnx import require_onnx_form

        require_onnx_form(hubert_eff.load(out))
    held, metadata = load_file(out), read_metadata(Path(out))
    save_file({name: t.float() if name.endswith(".codes") else t for name, t in held.items()}, out, metadata)
    with pytest.raises(UserError, match="do not fit its configuration"):
        hubert_eff.load(out)
