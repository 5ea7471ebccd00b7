"""Exports of fine-tuned models: heads and alphabet stay with the encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.errors import UserError
from hubert_eff.exporting.recognizer import export_recognizer
from hubert_eff.quant.quantization import is_int8
from hubert_eff.recognition import Recognizer, load_recognizer

from ..helpers.recognizers import make, save

WAV = torch.linspace(0, 900, 16000).sin()[None] / 3


def started(**keys) -> Recognizer:
    torch.manual_seed(0)
    model = make(**keys).train()
    with torch.no_grad():
        model.hubert.hidden_states(WAV)  # scales of a one-bit encoder see data
    return model.eval()


@pytest.mark.parametrize(
    "keys",
    [
        {}, {"decoder_layers": 1}, {"decoder_layers": 1, "norm": "batch_norm"}, {"decoder_layers": 1, "decoder": "lstm"},
        {"preset": "transformer-debug+w1a1", "decoder_layers": 1},
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_recognizer_comes_back(keys, tmp_path: Path) -> None:
    model, file = started(**keys), tmp_path / "model.safetensors"
    export_recognizer(model, file)
    read = load_recognizer(file)
    assert read.config.letters == model.config.letters and read.alphabet.symbols == model.alphabet.symbols
    assert read.hubert.heads == model.hubert.heads and not read.training
    (ours, _), (theirs, _) = model.encode(WAV), read.encode(WAV)
    assert torch.equal(ours, theirs) and torch.equal(model.ctc_log_probs(ours), read.ctc_log_probs(theirs))
    ours_by_name, theirs_by_name = model.state_dict(), read.state_dict()
    assert all(torch.equal(tensor, theirs_by_name[name]) for name, tensor in ours_by_name.items() if not name.startswith("hubert."))
    assert torch.equal(hubert_eff.load(file).hidden_states(WAV)[0][-1], model.hubert.hidden_states(WAV)[0][-1])
    half = tmp_path / "half.safetensors"
    export_recognizer(model, half, dtype="fp16")
    assert half.stat().st_size < file.stat().st_size
    assert (load_recognizer(half).ctc_log_probs(ours) - model.ctc_log_probs(ours)).abs().max() < 1e-2


def test_the_command_keeps_heads_and_transcribe_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, file = save(started(decoder_layers=1), tmp_path / "checkpoint.pt"), tmp_path / "model.safetensors"
    soundfile.write(tmp_path / "a.wav", WAV[0].numpy(), 16000)
    assert main(["export", str(checkpoint), "--out", str(file)]) == 0
    assert "CTC layer and attention decoder" in capsys.readouterr().out
    said = []
    for source in (checkpoint, file):
        assert main(["transcribe", str(source), str(tmp_path / "a.wav"), "--search", "attention", "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out)["recordings"])
    assert said[0] == said[1]
    assert main(["export", str(checkpoint), "--out", str(file), "--encoder-only"]) == 0
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "edge.safetensors"), "--edge"]) == 2
    assert "--edge writes encoders" in capsys.readouterr().err and not (tmp_path / "edge.safetensors").exists()
    assert main(["transcribe", str(file), str(tmp_path / "a.wav")]) == 2
    assert "has no CTC layer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"letters": "|ABCD"}, "do not fit its configuration: ctc_proj"),
        ({"decoder_layers": 2}, "do not fit its configuration: decoder"),
        ({"letters": ""}, "an alphabet is"),
        ({"decoder_layers": -1}, "decoder_layers"),
        ({"unknown": 1}, "unknown key"),
    ],
)
def test_metadata_that_do_not_fit_are_one_line(change, said: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    export_recognizer(started(decoder_layers=1), file)
    with safe_open(file, framework="pt") as stream:
        metadata, weights = stream.metadata(), {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    metadata["recognizer"] = json.dumps({**json.loads(metadata["recognizer"]), **change})
    save_file(weights, file, metadata)
    with pytest.raises(UserError) as raised:
        load_recognizer(file)
    assert said in str(raised.value) and "\n" not in str(raised.value)


@torch.no_grad()
def test_an_int8_recognizer_keeps_its_heads_in_float(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = started(decoder_layers=1)
    checkpoint, file = save(model, tmp_path / "checkpoint.pt"), tmp_path / "int8.safetensors"
    soundfile.write(tmp_path / "a.wav", WAV[0].numpy(), 16000)
    assert main(["export", str(checkpoint), "--out", str(file), "--dtype", "int8"]) == 0
    assert "int8 weights, the rest fp32, with its CTC layer and attention decoder" in capsys.readouterr().out
    read = load_recognizer(file)
    assert is_int8(read.hubert) and torch.equal(read.ctc_proj.weight, model.ctc_proj.weight)
    assert read.decoder is not None and not is_int8(read.decoder)
    found, expected = (each.ctc_log_probs(each.encode(WAV)[0]) for each in (read, model))
    assert 0 < (found - expected).abs().max() < 0.1
    assert torch.equal(read.encode(WAV)[0], hubert_eff.quantize(model.hubert).hidden_states(WAV)[0][-1])
    for search in ("greedy", "attention"):
        assert main(["transcribe", str(file), str(tmp_path / "a.wav"), "--search", search, "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["recordings"]) == 1
    assert main(["export", str(checkpoint), "--onnx", str(tmp_path / "a.onnx"), "--out", str(file), "--dtype", "int8"]) == 2
    assert "--dtype int8 of a recognizer is for --out" in capsys.readouterr().err
