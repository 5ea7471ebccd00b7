"""Folders for transformers: native ones where this package is not installed, others by `hubert_eff.hf`, and what their cards say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.errors import UserError
from hubert_eff.exporting.huggingface import export_folder

from ..helpers.foreign import apart, audio
from ..helpers.packed import debug
from ..helpers.paths import ROOT
from ..helpers.recognizers import make, save

pytest.importorskip("transformers")

# of transformer-debug: keys that its folder must carry over
NATIVE: dict[str, dict[str, Any]] = {
    "debug": {},
    "group norm": {"extractor_mode": "default", "conv_bias": False},
    "pre-norm, no masks": {"layer_norm_first": True, "mask_prob": 0.0, "conv_pos": 31},
    "no norm of features": {"feature_norm": False},
    "no projection": {"encoder_embed_dim": 32},
    "fastconv, normalized": {"conv_feature_layers": "fastconv", "extractor_mode": "default", "normalize": True},
}
ENCODERS = [encoder for encoder in hubert_eff.list_encoders() if encoder != "transformer"]


def run(code: str, tmp_path: Path, *names: object) -> list[str]:
    """What a process prints that finds this checkout."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-c", code, *map(str, names)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


ALONE = """
import sys
sys.modules["hubert_eff"] = None  # not installed
import torch
from transformers import AutoFeatureExtractor, AutoModel, pipeline
for folder in sys.argv[1:]:
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    wav, padding, states, frames = torch.load(f"{folder}/expected.pt")
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    recordings = [row[~mask].numpy() for row, mask in zip(wav, padding)]
    batch = extractor(recordings, sampling_rate=16000, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**batch, output_hidden_states=True).hidden_states
    print(type(model).__name__, len(found) == len(states), max(float((a - b)[~frames].abs().max()) for a, b in zip(found, states)))
features = torch.tensor(pipeline("feature-extraction", model=sys.argv[1])(wav[0].numpy()))
with torch.no_grad():
    print(float((features - AutoModel.from_pretrained(sys.argv[1])(wav[:1])[0]).abs().max()))
"""


def test_a_transformer_needs_nothing_of_this_package(tmp_path: Path) -> None:
    """Read in a process where it cannot be imported; read back it is the same model."""
    wav, padding = audio()
    wav = 3 * wav
    for name, keys in NATIVE.items():
        model = hubert_eff.build("transformer-debug", **keys).eval()
        folder = tmp_path / name
        export_folder(model, folder)
        with torch.no_grad():
            states, frames = model.hidden_states(wav, padding)
        torch.save((wav, padding, states, frames), folder / "expected.pt")
        again = hubert_eff.load(folder)
        assert apart(again.hidden_states(wav, padding)[0], frames, states) < 1e-5
        one, two = model.state_dict(), again.state_dict()
        differs = {key for key in one if not torch.equal(one[key], two[key])}
        assert one.keys() == two.keys()
        assert differs <= {"final_proj.weight", "final_proj.bias", *(["mask_emb"] if keys.get("mask_prob") == 0.0 else [])}
    *lines, features = run(ALONE, tmp_path, *(tmp_path / name for name in NATIVE))
    for line in lines:
        kind, complete, difference = line.split()
        assert (kind, complete) == ("HubertModel", "True") and float(difference) < 2e-5, lines
    assert len(lines) == len(NATIVE) and float(features) == 0.0


@pytest.mark.parametrize("encoder", ENCODERS)
def test_other_encoders_load_by_the_classes_of_this_package(tmp_path: Path, encoder: str) -> None:
    """Float and one-bit, to the last bit."""
    from transformers import AutoModel

    import hubert_eff.hf

    wav, padding = audio()
    for name, model in (("float", hubert_eff.build(f"{encoder}-debug").eval()), ("one-bit", debug(encoder, "default"))):
        export_folder(model, tmp_path / name)
        core = hubert_eff.load(tmp_path / name)
        loaded = AutoModel.from_pretrained(tmp_path / name)
        assert isinstance(loaded, hubert_eff.hf.HubertEffModel) and not loaded.training
        with torch.no_grad():
            output = loaded(wav, attention_mask=(~padding).long(), output_hidden_states=True)
            states, frames = core.hidden_states(wav, padding)
            before, _ = model.hidden_states(wav, padding)
        assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, states, strict=True))
        assert torch.equal(output.last_hidden_state, states[-1])
        if name == "float":
            assert apart(states, frames, before) == 0.0
        loaded.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again/model.safetensors").read_bytes()[8:16] == (tmp_path / name / "model.safetensors").read_bytes()[8:16]
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "again")(wav)[0], loaded(wav)[0])


REMOTE = """
import sys, torch
from transformers import AutoModel, pipeline
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
features = pipeline("feature-extraction", model=sys.argv[1], trust_remote_code=True)(torch.ones(4000).mul(0.1).numpy())
with torch.no_grad():
    print(type(model).__module__, float((torch.tensor(features) - model(torch.ones(1, 4000).mul(0.1))[0]).abs().max()))
"""


@pytest.mark.long
def test_remote_code_is_that_of_this_package(tmp_path: Path) -> None:
    export_folder(debug("conformer", "default"), tmp_path / "model")
    assert run(REMOTE, tmp_path, tmp_path / "model")[-1] == "hubert_eff.hf 0.0"


def test_without_transformers(tmp_path: Path) -> None:
    """A native folder is written, and read back; the classes ask for the extra."""
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from hubert_eff.cli import main\n"
        "import hubert_eff\n"
        "assert main(['export', 'transformer-debug', '--hf', 'out']) == 0 and hubert_eff.load('out')\n"
        "try: import hubert_eff.hf\n"
        "except ValueError as error: print(error)"
    )
    assert run(code, tmp_path)[-1] == "hubert_eff.hf needs the package 'transformers': pip install 'hubert-eff[hf]'"


def test_a_recognizer_becomes_a_ctc_model(tmp_path: Path) -> None:
    import transformers

    model = make("transformer-debug", normalize=True).eval()
    assert main(["export", str(save(model, tmp_path / "ctc.pt")), "--hf", str(tmp_path / "hf"), "--license", "MIT"]) == 0
    loaded = transformers.AutoModelForCTC.from_pretrained(tmp_path / "hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    wav, padding = audio()
    recordings = [row[~mask].numpy() for row, mask in zip(10 * wav, padding, strict=True)]
    with torch.no_grad():
        scores = loaded(**processor(recordings, sampling_rate=16_000, padding=True, return_tensors="pt")).logits.log_softmax(-1)
        encoded, frames = model.encode(10 * wav, padding)
        expected = model.ctc_log_probs(encoded)
    assert apart([scores], frames, [expected]) < 1e-4
    assert processor.decode([1, 2, 2, 0, 2, 3, 1, 4]) == "AAB C"
    assert processor.tokenizer("A BC").input_ids == model.alphabet.spell("A BC")
    said = transformers.pipeline("automatic-speech-recognition", model=str(tmp_path / "hf"))(recordings[0])["text"]
    labels = [int(n) for n in torch.unique_consecutive(scores[0].argmax(-1))]
    assert said == model.alphabet.text(labels)
    front = yaml.safe_load((tmp_path / "hf" / "README.md").read_text().split("---\n")[1])
    assert (front["pipeline_tag"], front["metrics"], front["license"]) == ("automatic-speech-recognition", ["wer"], "mit")
    assert hubert_eff.load(tmp_path / "hf").heads == "CTC layer"
    assert main(["export", str(tmp_path / "ctc.pt"), "--hf", str(tmp_path / "hf"), "--encoder-only"]) == 0
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "hf")).__name__ == "HubertModel"
    assert not (tmp_path / "hf" / "vocab.json").exists()


def test_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = [
        "--license",
        "CC BY 4.0",
        "--trained-on",
        "LibriSpeech 960 h, own: speech | noise",
        "--base-model",
        "facebook/hubert-base-ls960",
    ]
    assert main(["export", "transformer-debug", "--hf", str(tmp_path / "native"), *said, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["hf"]
    text = (tmp_path / "native" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {
        "license": "cc-by-4.0", "library_name": "transformers", "pipeline_tag": "feature-extraction", "tags": ["speech", "hubert"],
        "datasets": ["LibriSpeech 960 h", "own: speech | noise"], "metrics": [], "base_model": "facebook/hubert-base-ls960",
    }  # fmt: skip
    import transformers

    params = transformers.AutoModel.from_pretrained(tmp_path / "native").num_parameters()
    assert figures["params"] == params and f"| parameters | {params:,} |" in text
    assert "import hubert_eff" not in text and "# native" in text
    assert main(["export", "conformer-debug", "--hf", str(tmp_path / "own"), "--license", "my own"]) == 0
    text = (tmp_path / "own" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["license"], front["license_name"], front["library_name"]) == ("other", "my-own", "hubert-eff")
    assert "import hubert_eff.hf" in text and "trust_remote_code=True" in text
    again = [
        "export",
        str(tmp_path / "own" / "model.safetensors"),
        "--hf",
        str(tmp_path / "again"),
    ]  # notes of the file that is exported again are kept
    assert main(again) == 0 and "license_name: my-own" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (["transformer-debug"], "--hf DIR"),
        (["transformer-debug", "--onnx", "x.onnx", "--base-model", "a/b"], "--base-model is for the README.md of --hf DIR"),
        (["transformer-debug", "--hf", "out", "--fuse"], "--hf DIR is not fused"),
        (["aed.pt", "--hf", "out"], "its attention decoder has no place in transformers' classes: --encoder-only"),
        (["conformer.pt", "--hf", "out"], "transformers has a CTC layer for the Transformer alone: --encoder-only"),
        (["conformer.pt", "--hf", "out", "--out", "x.safetensors"], "transformers has a CTC layer for the Transformer alone"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "aed.pt" in words:
        save(make("transformer-debug", decoder_layers=1), tmp_path / "aed.pt")
    if "conformer.pt" in words:
        save(make("conformer-debug"), tmp_path / "conformer.pt")
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


def test_models_that_transformers_cannot_hold_keep_their_own_class(tmp_path: Path) -> None:
    for name, keys in (("mel", {"conv_feature_layers": "logmel-conv"}), ("causal", {"streaming": True, "conv_context": "causal"})):
        export_folder(hubert_eff.build("transformer-debug", **keys).eval(), tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == "hubert_eff"
    with pytest.raises(UserError, match="expected a HubertModel or a Recognizer"):
        export_folder(torch.nn.Linear(2, 2), tmp_path / "none")  # type: ignore[arg-type]
