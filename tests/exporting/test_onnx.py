"""ONNX: every encoder under onnxruntime, at several lengths, alone and in a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.edge import rewrite
from hubert_eff.errors import UserError
from hubert_eff.models.hubert import HubertModel
from hubert_eff.quant import pack
from hubert_eff.quant.attention import Probabilities
from hubert_eff.recognition.model import RecognizerConfig

from ..helpers.packed import debug
from ..helpers.recognizers import LETTERS, make, save

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


@pytest.mark.parametrize("front", ["logmel-dws", *(pytest.param(f, marks=pytest.mark.long) for f in ("logmel-conv", "conv-embed"))])
@torch.no_grad()
def test_log_mel_fronts(front: str, tmp_path: Path) -> None:
    """Also of silence, and of a tone 50 dB above the noise around it: with more, torch's own spectrogram is off by 1e-4 in float32."""
    from hubert_eff.exporting.onnx import export_onnx

    model, path = trained("conformer-debug", conv_feature_layers=front), tmp_path / "model.onnx"
    assert export_onnx(model, path)["difference"] < 1e-4
    assert all(largest < 1e-4 for largest, _ in differences(model, path))
    assert not {"DFT", "STFT"} & {node.op_type for node in onnx.load(path).graph.node}
    wav = 0.9 * torch.sin(torch.arange(16_000) * 0.3).unsqueeze(0) + 3e-3 * torch.randn(1, 16_000)
    wav[:, 8_000:12_000] = 0.0
    (states,) = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"wav": wav.numpy()})
    torch.testing.assert_close(torch.from_numpy(states), torch.stack(model.hidden_states(wav)[0]), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("encoder", ["conformer", *(pytest.param(e, marks=pytest.mark.long) for e in ("transformer", "fusionformer"))])
@torch.no_grad()
def test_the_layout_of_accelerators(encoder: str, tmp_path: Path) -> None:
    from hubert_eff.exporting.onnx import export_onnx

    model, path = trained(f"{encoder}-debug"), tmp_path / "model.onnx"
    assert export_onnx(rewrite(model), path)["difference"] < 1e-4
    assert all(largest < 1e-4 for largest, _ in differences(model, path))
    graph = onnx.load(path)
    assert {prop.key: prop.value for prop in graph.metadata_props}["layout"] == "(batch, channels, 1, frames)"
    assert len(graph.graph.output[0].type.tensor_type.shape.dim) == 4 and "Einsum" in {node.op_type for node in graph.graph.node}


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-4), ("fp16", 0.05)])
@torch.no_grad()
def test_the_parts_for_small_devices_together(dtype: str, tolerance: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Preset conformer-edge with two blocks: file, graph and float32 model agree; one of long audio, whose softmax has more keys."""
    trained, out, graph = tmp_path / "trained.safetensors", tmp_path / "edge.safetensors", tmp_path / "edge.onnx"
    hubert_eff.export(hubert_eff.build("conformer-edge", encoder_layers=2), trained)
    assert main(["export", str(trained), "--edge", "--dtype", dtype, "--out", str(out), "--onnx", str(graph), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["onnx"]["difference"] < tolerance
    model, edge = hubert_eff.load(trained), hubert_eff.load(out)
    assert edge.edge == {"fp32": "stable", "fp16": "half"}[dtype]
    session = runtime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    for samples in (400, 9_001, 64_000):
        wav = torch.randn(1, samples)
        (states,) = session.run(None, {"wav": wav.numpy()})
        for expected, found, in_graph in zip(model.hidden_states(wav)[0], edge.hidden_states(wav)[0], torch.from_numpy(states)):
            torch.testing.assert_close(found.float(), expected, rtol=0, atol=tolerance)
            torch.testing.assert_close(in_graph.float(), expected, rtol=0, atol=tolerance)
    described = {prop.key: prop.value for prop in onnx.load(graph).metadata_props}
    assert (described["edge"], described["form"]) == (edge.edge, "float16 weights" if dtype == "fp16" else "float weights")


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
    assert main(["export", "sparseformer-debug", *both, "--edge"]) == 2
    assert "cannot be rewritten" in capsys.readouterr().err and not (tmp_path / "model.safetensors").exists()
    assert main(["export", "transformer-debug", "--edge", "--hf", str(tmp_path / "folder")]) == 2
    assert "--edge says how --out" in capsys.readouterr().err
    assert main(["export", "transformer-debug", "--edge", *both, "--dtype", "bf16"]) == 2
    assert "--edge writes float32 or float16" in capsys.readouterr().err
    assert main(["export", "transformer-debug+w1a2", *both]) == 2
    assert "has no ONNX form" in capsys.readouterr().err and not (tmp_path / "model.safetensors").exists()


def test_models_without_an_onnx_form(tmp_path: Path) -> None:
    from hubert_eff.exporting.onnx import export_onnx

    with pytest.raises(UserError, match="packed bits have no ONNX form: export the checkpoint"):
        export_onnx(pack(debug("transformer")), tmp_path / "model.onnx")
    with pytest.raises(UserError, match="a w1a2 model has no ONNX form"):
        export_onnx(hubert_eff.build("transformer-debug+w1a2"), tmp_path / "model.onnx")
    broken = hubert_eff.build("transformer-debug").eval()
    broken.encoder.layers[0].activation = lambda x: torch.fft.rfft(x, 2 * x.size(-1) - 1).real
    with pytest.raises(UserError, match="an operation without an ONNX form"):
        export_onnx(broken, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keys", [{}, {"decoder_layers": 1}, {"preset": "zipformer-debug"}])
@torch.no_grad()
def test_a_recognizer(keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = make(**keys).eval(), tmp_path / "model.onnx"
    assert main(["export", str(save(model, tmp_path / "checkpoint.pt")), "--onnx", str(path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["onnx"]
    assert figures["output"] == "log_probs" and figures["difference"] < 1e-4 and figures["share_off"] == 0
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        wav = torch.randn(shape)
        (found,) = session.run(["log_probs"], {"wav": wav.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model.ctc_log_probs(model.encode(wav)[0]), rtol=0.0, atol=1e-4)
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["symbols"]) == list(LETTERS) and said["heads"] == model.hubert.heads
    assert RecognizerConfig.from_dict(json.loads(said["recognizer"])) == model.config


def test_recognizers_without_an_onnx_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, path = save(make(preset="conformer-debug+w1a1").eval(), tmp_path / "checkpoint.pt"), tmp_path / "model.onnx"
    assert main(["export", str(checkpoint), "--onnx", str(path)]) == 2
    assert "a one-bit recognizer has no ONNX form: --encoder-only" in capsys.readouterr().err and not path.exists()
