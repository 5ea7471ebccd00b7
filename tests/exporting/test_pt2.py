"""torch.export programs: every encoder at lengths and batches that were not traced, by torch alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.edge import rewrite
from hubert_eff.errors import UserError
from hubert_eff.exporting import pt2
from hubert_eff.exporting.pt2 import DESCRIPTION, _States, export_pt2
from hubert_eff.models.hubert import HubertModel
from hubert_eff.quant import pack

from ..helpers.packed import debug
from ..helpers.recognizers import LETTERS, make, save

pytestmark = pytest.mark.skipif(not pt2._has_bounds(), reason="this torch.export knows no bounds of dynamic sizes")
SECONDS = (0.1, 1.0, 7.3, 60.0)
# all that a user needs: torch, and the file
ALONE = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    outputs = [program(wav, padding) for wav, padding in inputs]
assert not [name for name in sys.modules if name.startswith("hubert_eff")]
torch.save(outputs, sys.argv[3])
"""


def batches() -> list[tuple[Tensor, Tensor]]:
    """(wav, padding) of every length, alone, and but for the longest in a batch with padding."""
    found = []
    for seconds in SECONDS:
        samples = round(seconds * 16_000)
        for batch in (1, 4) if seconds < 60 else (1,):
            padding = torch.zeros(batch, samples, dtype=torch.bool)
            for row in range(1, batch):
                padding[row, samples - row * samples // 8 :] = True
            found.append((torch.randn(batch, samples), padding))
    return found


def run_alone(program: Path, inputs: list[tuple[Tensor, Tensor]]) -> list[Any]:
    """What a process that knows torch alone computes."""
    given, taken = program.with_suffix(".inputs"), program.with_suffix(".outputs")
    torch.save(inputs, given)
    done = subprocess.run([sys.executable, "-c", ALONE, program, given, taken], cwd=program.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(taken, weights_only=True)  # type: ignore[no-any-return]


def trained(preset: str, **keys: Any) -> HubertModel:
    """Whose BatchNorms have seen something."""
    model = hubert_eff.build(preset, **keys).train()
    with torch.no_grad():
        model.hidden_states(torch.randn(2, 16_000))
    return model.eval()


@pytest.mark.long
@pytest.mark.parametrize(
    "encoder, keys",
    [
        ("transformer", {"extractor_mode": "default", "normalize": True, "layer_norm_first": True, "valid_frames": "fairseq"}),
        ("conformer", {}),
        ("squeezeformer", {}),
        ("sparseformer", {"sparse_pattern": "local", "sparse_window": 5, "conv_feature_layers": "conv-embed"}),
        ("fusionformer", {"conv_feature_layers": "logmel-dws"}),
        ("zipformer", {}),
    ],
)
@torch.no_grad()
def test_every_encoder_at_every_length(encoder: str, keys: dict[str, Any], tmp_path: Path) -> None:
    model, path = trained(f"{encoder}-debug", **keys), tmp_path / "model.pt2"
    assert export_pt2(model, path)["difference"] < 1e-5
    inputs = batches()
    for (wav, padding), (states, frames) in zip(inputs, run_alone(path, inputs), strict=True):
        expected, expected_frames = model.hidden_states(wav, padding)
        assert torch.equal(frames, expected_frames) and len(states) == len(expected)
        for found, state in zip(states, expected, strict=True):
            torch.testing.assert_close(found, state, rtol=0.0, atol=1e-5)


@pytest.mark.long
@torch.no_grad()
def test_strict_export_follows_a_model() -> None:
    model = _States(trained("transformer-debug")).eval()
    sizes = {0: torch.export.Dim.AUTO(min=1, max=8), 1: torch.export.Dim.AUTO(min=720, max=960_000)}
    (wav, padding), *_, longer = batches()[1:4]
    program = torch.export.export(model, (wav, padding), dynamic_shapes={"wav": sizes, "padding_mask": dict(sizes)}, strict=True)
    torch.testing.assert_close(program.module()(*longer), model(*longer), rtol=0.0, atol=1e-5)


@torch.no_grad()
def test_a_recognizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = make().eval(), tmp_path / "new" / "model.pt2"
    assert main(["export", str(save(model, tmp_path / "checkpoint.pt")), "--pt2", str(path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["pt2"]
    assert figures["file"] == str(path) and figures["bytes"] == path.stat().st_size and figures["difference"] < 1e-5
    said = {DESCRIPTION: ""}
    run = torch.export.load(path, extra_files=said).module()
    described = json.loads(said[DESCRIPTION])
    assert described["letters"] == LETTERS and described["outputs"] == ["log_probs", "padding"] and described["encoder"] == "conformer"
    inputs = batches()
    for (wav, padding), (log_probs, found) in zip(inputs, run_alone(path, inputs), strict=True):
        encoded, frames = model.encode(wav, padding)
        assert torch.equal(found, frames)
        torch.testing.assert_close(log_probs, model.ctc_log_probs(encoded), rtol=0.0, atol=1e-5)
    assert str(Path(hubert_eff.__file__).parent).encode() not in path.read_bytes()  # nothing of this machine
    with pytest.raises(Exception, match="720"):  # of one frame
        run(torch.zeros(1, 500), torch.zeros(1, 500, dtype=torch.bool))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "transformer-debug", "--pt2", str(tmp_path / "model.pt")]) == 2
    assert "must end in .pt2" in capsys.readouterr().err
    both = ["--out", str(tmp_path / "model.safetensors"), "--pt2", str(tmp_path / "model.pt2")]
    assert main(["export", "transformer-debug+w1a1", *both]) == 2
    error = capsys.readouterr().err
    assert "a one-bit model has no torch.export program" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_models_without_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt2"
    with pytest.raises(UserError, match="a one-bit model has no torch.export program"):
        export_pt2(pack(debug("transformer")), path)
    with pytest.raises(UserError, match="a rewritten model .* write --out"):
        export_pt2(rewrite(hubert_eff.build("transformer-debug")), path)
    with pytest.raises(UserError, match="is a .pt2 file"):
        export_pt2(hubert_eff.build("transformer-debug"), tmp_path / "model.pth")
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="cannot follow this model: division by zero"):
        export_pt2(hubert_eff.build("transformer-debug"), path)
    monkeypatch.setattr(pt2, "_has_bounds", lambda: False)
    with pytest.raises(UserError, match="--pt2 needs torch 2.7 or newer"):
        export_pt2(hubert_eff.build("transformer-debug"), path)
    assert not list(tmp_path.iterdir())
