"""ONNX: every encoder under onnxruntime, at several lengths, alone and in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.errors import UserError
from hubert_eff.models.hubert import HubertModel
from hubert_eff.quant import pack
from hubert_eff.quant.attention import Probabilities

from ..helpers.packed import debug

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

ENCODERS = hubert_eff.list_encoders()
SHAPES = [(2, 16_000), (3, 23_456), *((1 + n % 2, 400 + 320 * n) for n in (0, 1, 2, 3, 4, 7, 8, 26))]  # 1 frame, 2, ...


def differences(model: HubertModel, path: Path) -> list[tuple[float, float]]:
    """(largest, share of elements off by more than 1e-3) for each shape."""
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for shape in SHAPES:
        wav = torch.randn(shape)
        (states,) = session.run(["hidden_states"], {"wav": wav.numpy()})
        expected = torch.stack(model.hidden_states(wav)[0])
        assert states.shape == tuple(expected.shape)
        off = (torch.from_numpy(states) - expected).abs()
        found.append((float(off.max()), float((off > 1e-3).float().mean())))
    return found


def trained(preset: str, **keys: Any) -> HubertModel:
    """Whose BatchNorms have seen something."""
    model = hubert_eff.build(preset, **keys).train()
    with torch.no_grad():
        model.hidden_states(torch.randn(2, 16_000))
    return model.eval()


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_float_models(encoder: str, tmp_path: Path) -> None:
    from hubert_eff.exporting.onnx import export_onnx

    model, path = trained(f"{encoder}-debug"), tmp_path / "model.onnx"
    figures = export_onnx(model, path)
    assert figures["difference"] < 1e-4 and figures["form"] == "float weights"
    assert all(largest < 1e-4 for largest, _ in differences(model, path))
    nodes = {node.op_type for node in onnx.load(path).graph.node}
    assert "BatchNormalization" not in nodes or encoder != "fusionformer"


@pytest.mark.parametrize(
    "preset, keys",
    [
        ("transformer-debug", {"extractor_mode": "default", "required_seq_len_multiple": 2, "normalize": True}),
        pytest.param("conformer-debug", {"pos_enc_type": "abs", "block_norm": "batch_norm"}, marks=pytest.mark.long),
        ("sparseformer-debug", {"sparse_pattern": "fairseq", "sparse_stride": 16, "sparse_expressivity": 4}),
        pytest.param(
            "sparseformer-debug", {"sparse_pattern": "fixed", "sparse_stride": 16, "sparse_expressivity": 4}, marks=pytest.mark.long
        ),
        pytest.param("sparseformer-debug", {"sparse_pattern": "local", "sparse_window": 5}, marks=pytest.mark.long),
    ],
)
@torch.no_grad()
def test_options(preset: str, keys: dict[str, Any], tmp_path: Path) -> None:
    from hubert_eff.exporting.onnx import export_onnx

    model, path = trained(preset, **keys), tmp_path / "model.onnx"
    export_onnx(model, path)
    assert all(largest < 1e-4 for largest, _ in differences(model, path))


@pytest.mark.parametrize("encoder", [e if e == "sparseformer" else pytest.param(e, marks=pytest.mark.long) for e in ENCODERS])
@torch.no_grad()
def test_one_bit_models_in_their_float_form(encoder: str, tmp_path: Path) -> None:
    """Equal but for bits at ties: float operations between binary layers round in their own order there. The graph keeps softmax."""
    from hubert_eff.exporting.onnx import export_onnx

    model, path = debug(encoder), tmp_path / "model.onnx"
    figures = export_onnx(model, path)
    assert figures["form"] == "one-bit model in its form of +-1 in floats"
    assert {prop.key: prop.value for prop in onnx.load(path).metadata_props}["form"] == figures["form"]
    for module in model.modules():
        if isinstance(module, Probabilities):
            module.by_softmax = True
    assert all(share < 0.2 for _, share in differences(model, path)), differences(model, path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "model.onnx"
    assert main(["export", "transformer-debug", "--onnx", str(out)]) == 0
    assert f"{out}: " in capsys.readouterr().out and out.is_file()
    assert main(["export", "transformer-debug", "--onnx", str(tmp_path / "model.pb")]) == 2
    assert "must end in .onnx" in capsys.readouterr().err
    both = ["--out", str(tmp_path / "model.safetensors"), "--onnx", str(tmp_path / "model.onnx")]
    assert main(["export", "transformer-debug+w1a2", *both]) == 2
    assert "has no ONNX form" in capsys.readouterr().err and not (tmp_path / "model.safetensors").exists()


def test_models_without_an_onnx_form(tmp_path: Path) -> None:
    from hubert_eff.exporting.onnx import export_onnx

    with pytest.raises(UserError, match="packed bits have no ONNX form: export the checkpoint"):
        export_onnx(pack(debug("transformer")), tmp_path / "model.onnx")
    with pytest.raises(UserError, match="a w1a2 model has no ONNX form"):
        export_onnx(hubert_eff.build("transformer-debug+w1a2"), tmp_path / "model.onnx")
    with pytest.raises(UserError, match="an operation without an ONNX form"):
        export_onnx(hubert_eff.build("conformer-debug", conv_feature_layers="logmel-conv").eval(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
