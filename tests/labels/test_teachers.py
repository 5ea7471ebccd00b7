"""Labels by encoders of other packages: their states, at 50 Hz; what cannot be used is refused in a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hubert_eff.cli import main
from hubert_eff.errors import UserError
from hubert_eff.labels import make as targets
from hubert_eff.labels.features import FeatureSource, HiddenLayer
from hubert_eff.labels.kmeans import KMeans
from hubert_eff.labels.make import make_labels, read_manifest
from hubert_eff.labels.teachers import open_teacher

from ..helpers.foreign import audio
from ..helpers.recordings import noise
from ..helpers.teachers import FOLDERS, Toy, folder, installed  # noqa: F401 (a fixture)

pytest.importorskip("sklearn")
pytest.importorskip("torchaudio")
transformers = pytest.importorskip("transformers")


def frames(samples: int) -> int:
    return 1 + (samples - 400) // 320


# ---- states


@pytest.mark.parametrize("kind", FOLDERS)
def test_states_are_those_of_transformers_of_each_utterance_alone(tmp_path: Path, kind: str) -> None:
    model, (wav, padding) = folder(tmp_path, kind), audio()
    teacher = open_teacher(str(tmp_path))
    assert teacher.rates == (50.0,) * 3 and teacher.depth == 2
    features = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    for mask in (None, padding):
        states = teacher.of_batch(wav, mask, range(3))
        for row, samples in enumerate([4000, 4000] if mask is None else [4000, 2900]):
            values = features(wav[row, :samples].numpy(), sampling_rate=16_000, return_tensors="pt").input_values
            with torch.no_grad():
                wanted = model(values, output_hidden_states=True).hidden_states
            for ours, theirs in zip(states, wanted, strict=True):
                torch.testing.assert_close(ours[row, : frames(samples)], theirs[0], atol=1e-5, rtol=1e-4)
                assert not ours[row, frames(samples) :].any()


def test_whisper_hears_windows_of_its_length_and_its_frames_are_cut(tmp_path: Path) -> None:
    """5.1 s in windows of 2 s: 100 frames each; an utterance shorter than that is extended by silence."""
    encoder = folder(tmp_path, "whisper")
    features = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    wav = noise(5.1)
    layer = HiddenLayer(str(tmp_path), 1, "cpu", 60.0)
    found = dict(layer.extract([wav, wav[:9000], wav[:400]]))
    parts = [wav[start : start + 32_000] for start in range(0, len(wav), 32_000)]
    with torch.no_grad():
        mel = features(parts, sampling_rate=16_000, return_tensors="pt").input_features
        wanted = encoder(mel, output_hidden_states=True).hidden_states[1]
        mel = features(wav[:9000], sampling_rate=16_000, return_tensors="pt").input_features
        short = encoder(mel, output_hidden_states=True).hidden_states[1][0]
    assert {index: len(states) for index, states in found.items()} == {0: frames(len(wav)), 1: frames(9000), 2: 1}
    np.testing.assert_allclose(found[0], wanted.flatten(0, 1).numpy()[: frames(len(wav))], atol=1e-5)
    np.testing.assert_allclose(found[1], short.numpy()[: frames(9000)], atol=1e-5)


@pytest.mark.parametrize(("rate", "done"), [(25, "each twice"), (50, None), (100, "every second")])
def test_other_rates_come_to_50_hz(installed: None, manifest: Path, tmp_path: Path, rate: int, done: str | None) -> None:  # noqa: F811
    wav = noise(0.7)
    [(_, found)] = HiddenLayer(f"toy:{rate}", 1, "cpu", 60.0).extract([wav])
    own = Toy(rate)(torch.from_numpy(wav)[None])[1][0].numpy()
    wanted = np.repeat(own, 2, axis=0) if rate == 25 else own[:: rate // 50]
    assert len(found) == frames(len(wav)) and abs(len(wanted) - len(found)) <= 1
    np.testing.assert_allclose(found[: len(wanted)], wanted[: len(found)], atol=1e-6)
    out = tmp_path / "out"
    made = make_labels(manifest, out, FeatureSource(f"toy:{rate}", 1), clusters=5, workers=1)
    assert (made["rate"], made["checkpoint"], made.get("teacher_rate"), made.get("teacher_frames")) == (
        50.0, f"toy:{rate}", float(rate) if done else None, done,
    )  # fmt: skip
    table = read_manifest(manifest / "valid.tsv")
    assert [len(line.split()) for line in (out / "valid.km").read_text().splitlines()] == [frames(n) for _, n in table.entries]


# ---- labels


def labels(manifest: Path, out: Path, spec: str, *more: str) -> list[str]:
    return ["labels", str(manifest), "--out", str(out), "--checkpoint", spec, "--layer", "1", "--clusters", "5", "--device", "cpu", *more]


@pytest.mark.parametrize("kind", ["hubert", "wav2vec2", "wavlm", "whisper", "conformer-debug@3"])
def test_labels_by_each_kind(manifest: Path, tmp_path: Path, capsys: Any, kind: str) -> None:
    spec = kind
    if "@" not in kind:
        folder(tmp_path / "model", kind)
        spec = str(tmp_path / "model")
    assert main(labels(manifest, tmp_path / "out", spec, "--workers", "1", "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["rate"], summary["layer"], summary["checkpoint"]) == (50.0, 1, spec)
    assert len(summary["checkpoint_sha256"]) == 64 and "teacher_rate" not in summary
    table = read_manifest(manifest / "train.tsv")
    counts = [len(line.split()) for line in (tmp_path / "out" / "train.km").read_text().splitlines()]
    assert counts == [frames(n) for _, n in table.entries]
    assert main(labels(manifest, tmp_path / "out", spec, "--workers", "1", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["reused"] is True


def test_labels_by_an_upstream_of_s3prl(installed: None, manifest: Path, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    pytest.importorskip("s3prl")
    arguments = labels(manifest, tmp_path / "out", "s3prl:fbank", "--workers", "1", "--json")
    arguments[arguments.index("--layer") + 1] = "0"
    assert main(arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["rate"], summary["teacher_rate"], summary["teacher_frames"]) == (50.0, 100.0, "every second")
    assert main([*arguments[:-1], "--layer", "1"]) == 2
    assert main(labels(manifest, tmp_path / "out", "s3prl:fbnk")) == 2
    layer, name = capsys.readouterr().err.splitlines()[-2:]
    assert "--layer 1 is not in s3prl:fbank: it has hidden states 0 to 0" in layer
    assert "S3PRL has no upstream 'fbnk': did you mean" in name and "fbank" in name


def test_a_run_that_was_killed_goes_on(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "model", "whisper")
    source = FeatureSource(str(tmp_path / "model"), 2)
    monkeypatch.setattr(targets, "SHARD_SECONDS", 10)
    make_labels(manifest, tmp_path / "whole", source, clusters=5)
    out, assign = tmp_path / "out", KMeans.assign

    def failing(self: KMeans, rows: np.ndarray) -> np.ndarray:
        if len(list(out.glob(".labels-*/*.km"))) == 2:
            raise KeyboardInterrupt
        return assign(self, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KMeans, "assign", failing)
        make_labels(manifest, out, source, clusters=5)
    finished = {p.name for p in out.glob(".labels-*/*.km")}
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")  # its content tells, not its place
    made, real = [], targets._label_shard
    with monkeypatch.context() as patch:
        patch.setattr(targets, "fit", lambda *_: pytest.fail("k-means was fitted again"))
        patch.setattr(targets, "_label_shard", lambda task, **rest: made.append(task[0].name) or real(task, **rest))
        make_labels(manifest, out, FeatureSource(str(tmp_path / "elsewhere"), 2), clusters=5)
    assert len(finished) == 2 and made and not finished & set(made)
    for name in ("train.km", "valid.km", "dict.km.txt"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ---- what is refused


def spoiled(kind: str, path: Path) -> str:
    """A name that cannot be used."""
    from safetensors.torch import load_file, save_file

    if ":" in kind:
        return kind
    stride = {"40 Hz": [5, 5, 2, 2, 2, 2, 1]}.get(kind)
    folder(path, "whisper" if "whisper" in kind else "wavlm", **({"conv_stride": stride} if stride else {}))
    config, weights = path / "config.json", path / "model.safetensors"
    values = json.loads(config.read_text())
    if kind == "no config":
        config.unlink()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "quantized by its configuration":
        config.write_text(json.dumps({**values, "quantization_config": {"quant_method": "gptq"}}))
    elif kind == "quantized weights":
        save_file({name: tensor.to(torch.int8) for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    elif kind == "a tensor is missing":
        held = load_file(weights)
        held.pop("encoder.layers.1.layer_norm.weight")
        save_file(held, weights, {"format": "pt"})
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "code of its own":
        shutil.copy(config, path / "evil.py")
        config.write_text(json.dumps({**values, "model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}))
    elif kind == "text":
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
        transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(path)
    elif kind == "whisper without preprocessing":
        (path / "preprocessor_config.json").unlink()
    elif kind == "whisper of other windows":
        transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=3).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "no config.json"),
        ("no weights", "holds config.json, but no weights"),
        ("quantized by its configuration", "its weights are quantized"),
        ("quantized weights", "quantized weights are not read"),
        ("a tensor is missing", "its weights lack encoder.layers.1.layer_norm.weight"),
        ("truncated", "model.safetensors is truncated or damaged"),
        ("40 Hz", "has 40 frames per second in its hidden state 1: only those of 25, 50 or 100"),
        ("code of its own", "transformers cannot open it"),
        ("text", "its model_type 'bert' takes input_ids, not samples of audio"),
        ("whisper without preprocessing", "no preprocessor_config.json, which says how Whisper's spectrogram is made"),
        ("whisper of other windows", "makes 8 bands of 300 frames, the encoder takes 8 of 200"),
        ("toy:40", "toy:40 has 40 frames per second"),
        ("toy:", "toy: names no encoder: write toy:NAME"),
        ("toy:x", "toy:x cannot be opened: ValueError"),
        ("tyo:50", "unknown kind of teacher (entry point of the group hubert_eff.teachers) 'tyo' - did you mean 'toy'?"),
    ],
)
def test_bad_teachers_are_refused_in_a_line(
    installed: None, manifest: Path, tmp_path: Path, capsys: Any, kind: str, message: str  # noqa: F811
) -> None:  # fmt: skip
    spec = spoiled(kind, tmp_path / "model")
    capsys.readouterr()
    assert main(labels(manifest, tmp_path / "out", spec)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "out").exists()


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    folder(tmp_path, "wavlm")
    with pytest.raises(UserError, match=r"--layer 3 is not in .*: it has hidden states 0 to 2"):
        FeatureSource(str(tmp_path), 3).open()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"a model of type 'wavlm' needs the package 'transformers': pip install 'hubert-eff\[hf\]'"):
        open_teacher(str(tmp_path))
