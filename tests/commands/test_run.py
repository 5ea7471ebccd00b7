"""Hidden states of audio files: rates, lengths, batches, windows, what is written, and input that must be refused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import hubert_eff
from hubert_eff.cli import main
from hubert_eff.data.manifest import Options, make_manifest
from hubert_eff.errors import UserError
from hubert_eff.inference.extraction import extract
from hubert_eff.models.hubert import HubertModel


def tone(seconds: float, rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """Something that changes over time, between -0.5 and 0.5."""
    random, t = np.random.default_rng(seed), np.arange(round(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * (200 + 50 * np.sin(t + seed)) * t) * np.abs(np.sin(3 * t))
    return (wave + 0.02 * random.standard_normal(len(t))).astype(np.float32)


@pytest.fixture
def audio(tmp_path: Path) -> list[Path]:
    """Four files of different lengths, rates and folders; two have the same name."""
    files = []
    for name, seconds, rate in (("a/x.wav", 1.3, 16_000), ("a/y.flac", 2.1, 8_000), ("b/x.wav", 0.7, 44_100), ("b/z.wav", 1.9, 16_000)):
        path = tmp_path / "audio" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(seconds, rate, len(files)), rate)
        files.append(path)
    return files


def model(preset: str = "conformer-debug", **keys: Any) -> HubertModel:
    """With scales, if it has quantizers."""
    built = hubert_eff.build(preset, **keys).train()
    with torch.no_grad():
        built.hidden_states(torch.from_numpy(tone(2.0))[None])
    return built.eval()


def test_a_batch_equals_one_by_one(audio: list[Path], tmp_path: Path) -> None:
    soxr = pytest.importorskip("soxr")
    assert soxr
    for preset, keys in (
        ("conformer-debug", {}),
        ("conformer-debug", {"extractor_mode": "default", "normalize": True}),
        ("zipformer-debug", {}),
    ):
        ours = model(preset, **keys)
        together = extract(ours, audio, tmp_path / "together.npz")
        extract(ours, audio, tmp_path / "apart.npz", batch=1)
        assert [recording.key for recording in together] == ["a/x.wav", "y", "b/x.wav", "z"]
        with np.load(tmp_path / "together.npz") as a, np.load(tmp_path / "apart.npz") as b:
            for recording in together:
                frames = (round(recording.seconds * 16_000) - 400) // 320 + 1
                depth = len(ours.encoder.layers)
                assert a[recording.key].shape == (depth + 1, frames, 64) and a[recording.key].dtype == np.float32
                np.testing.assert_allclose(a[recording.key], b[recording.key], atol=2e-5)
        wav, _ = soundfile.read(audio[3], dtype="float32")
        states, _ = ours.hidden_states(torch.from_numpy(wav)[None])
        with np.load(tmp_path / "apart.npz") as b:
            np.testing.assert_allclose(b["z"], torch.stack(states)[:, 0].detach().numpy(), atol=2e-5)


def test_a_packed_file_runs_as_the_model_does(audio: list[Path], tmp_path: Path) -> None:
    ours, file = model("transformer-debug+w1a1"), tmp_path / "model.safetensors"
    hubert_eff.export(ours, file)
    wavs = [audio[0], audio[3]]
    extract(ours, wavs, tmp_path / "simulated.npz", layer=2)
    extract(file, wavs, tmp_path / "packed.pt", layer=2)
    tensors = torch.load(tmp_path / "packed.pt", weights_only=True)
    with np.load(tmp_path / "simulated.npz") as arrays:
        assert set(arrays) == set(tensors) == {"x", "z"}
        for key in arrays:
            assert arrays[key].ndim == 2 and np.array_equal(arrays[key], tensors[key].numpy())


@pytest.mark.parametrize("keys", [{}, {"extractor_mode": "default", "normalize": True}])
def test_long_recordings_in_windows(keys: dict[str, Any], tmp_path: Path) -> None:
    """Same frames; state 0 is that of the whole pass, also where statistics are taken over the recording."""
    path, ours = tmp_path / "long.wav", model(**keys)
    soundfile.write(path, np.concatenate([tone(25, seed=1), 0.2 * tone(24.33, seed=2)]), 16_000)
    (cut,) = extract(ours, [path], tmp_path / "cut.npz", window=20)
    (whole,) = extract(ours, [path], tmp_path / "whole.npz", window=0)
    assert (cut.windows, whole.windows) == (5, 1) and cut.frames == whole.frames
    assert ours.config.normalize == bool(keys) and not list(tmp_path.glob(".*"))
    with np.load(tmp_path / "cut.npz") as a, np.load(tmp_path / "whole.npz") as b:
        assert a["long"].shape == b["long"].shape
        np.testing.assert_allclose(a["long"][0], b["long"][0], atol=1e-4)
        assert np.abs(a["long"][2] - b["long"][2]).max() > 1e-3  # attention sees less: this is not the same


def test_command(audio: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "features.npz"
    command = ["run", "transformer-debug", str(audio[0]), str(audio[3]), "--out", str(out), "--layer", "1", "--batch", "2"]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == out.stat().st_size
    assert said["recordings"][0] == {"file": "x.wav", "key": "x", "seconds": 1.3, "frames": 64, "windows": 1}
    assert main(command) == 0
    assert "hidden state 1 of 2 recordings, 3.2 s, 158 frames" in capsys.readouterr().out
    assert main(["run", "transformer-debug", str(audio[0]), "--out", str(out)]) == 0
    assert "all hidden states of 1 recording, 1.3 s" in capsys.readouterr().out


def write(path: Path, content: bytes | np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        soundfile.write(path, content, 16_000, subtype="FLOAT")
    return path


BAD: dict[str, tuple[bytes | np.ndarray, str]] = {
    "empty.wav": (b"", "zero bytes"),
    "text.wav": (b"this is not audio at all", "not readable as audio"),
    "none.wav": (np.zeros(0, np.float32), "no samples"),
    "nan.wav": (np.full(16_000, np.nan, np.float32), "NaN or infinite samples"),
    "short.wav": (np.full(399, 0.1, np.float32), "399 samples at 16 kHz are too few for one frame"),
    "speech.m4a": (b"....ftypM4A ", ".m4a is not decoded here; convert it to wav"),
}


@pytest.mark.parametrize("name", BAD)
def test_audio_that_cannot_be_used(name: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(HubertModel, "hidden_states", lambda *_: pytest.fail("work had started"))
    content, message = BAD[name]
    path = write(tmp_path / "bad" / name, content)
    assert main(["run", "transformer-debug", str(path), "--out", str(tmp_path / "f.npz")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"hubert-eff run: {path}: ") and message in said and said.count("\n") == 1
    assert not (tmp_path / "f.npz").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["transformer-debug", "absent.wav", "--out", "f.npz"], "no audio file at absent.wav"),
        (["transformer-debug", "folder.npz", "--out", "f.npz"], "no recording in the folder folder.npz"),
        (["transformer-debug", "{0}", "--out", "f.csv"], "must end in .npz or .pt"),
        (["transformer-debug", "{0}", "--out", "f.npz", "--layer", "3"], "layer 3 is not there: this model has hidden states 0 to 2"),
        (["transformer-debug", "{0}", "--out", "f.npz", "--layer", "-1"], "layer -1 is not there"),
        (["transformer-debug", "{0}", "--out", "f.npz", "--batch", "0"], "batch=0 must be at least 1"),
        (["transformer-debug", "{0}", "--out", "f.npz", "--window", "5"], "window=5 must be 20 to 3600 seconds, or 0"),
        (["transformer-debug", "{0}", "--out", "f.npz", "--window", "nan"], "window=nan must be"),
        (["transformer-debug", "{0}", "{0}", "--out", "f.npz"], "is given twice"),
        (["transformer-debug", "{0}", "--out", "folder.npz"], "folder.npz is a folder: name a file"),
        (["no-such-model", "{0}", "--out", "f.npz"], "unknown preset or checkpoint 'no-such-model'"),
    ],
)
def test_bad_input(words: list[str], message: str, audio: list[Path], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.npz").mkdir()
    assert main(["run", *(word.format(audio[0]) for word in words)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not list(tmp_path.glob("f.*"))


def test_silence_has_features_too(tmp_path: Path) -> None:
    path = write(tmp_path / "silence.wav", np.zeros(16_000, np.float32))
    (recording,) = extract("transformer-debug", [path], tmp_path / "f.npz")
    assert recording.frames == 49
    with np.load(tmp_path / "f.npz") as arrays:
        assert np.isfinite(arrays["silence"]).all()


def test_nothing_is_left_of_a_run_that_fails(audio: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "f.npz"
    out.write_bytes(b"what was there before")

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(HubertModel, "hidden_states", fail)
    with pytest.raises(RuntimeError):
        extract(model_without_states(), [audio[0]], out)
    assert out.read_bytes() == b"what was there before" and sorted(p.name for p in tmp_path.iterdir()) == ["audio", "f.npz"]


def model_without_states() -> HubertModel:
    return hubert_eff.build("transformer-debug").eval()


def test_no_two_recordings_share_a_name(tmp_path: Path) -> None:
    for names, keys in (
        (["x.wav", "y.wav"], ["x", "y"]),
        (["x.wav", "x.flac", "y.wav"], ["x.wav", "x.flac", "y"]),
        (["x.wav", "x.flac", "x.wav.flac"], ["x.wav", "x.flac", "x.wav.flac"]),
    ):
        files = [tmp_path / name for name in names]
        for file in files:
            soundfile.write(file, tone(0.1), 16_000)
        assert [recording.key for recording in extract(model_without_states(), files, tmp_path / "f.npz", layer=0)] == keys


def test_folders_and_manifests(tmp_path: Path) -> None:
    for name in ("a/1.wav", "a/deep/2.wav", "b/1.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, tone(0.1), 16_000)
    make_manifest(tmp_path / "b", tmp_path / "list", options=Options(valid_percent=0))
    ours = model_without_states()

    def names(*given: str) -> list[str]:
        return [recording.key for recording in extract(ours, [tmp_path / name for name in given], tmp_path / "f.npz", layer=0)]

    assert names("a") == ["1", "deep/2"]
    assert names("a/deep/2.wav", "list/train.tsv") == ["2", "1"]
    assert names("a/1.wav") == ["1"]  # whatever else is given, unless that has the same name
    assert names("a/1.wav", "b/1.wav") == ["a/1.wav", "b/1.wav"]
    (tmp_path / "a" / "bad.wav").write_bytes(b"no sound")
    said: list[str] = []
    extract(ours, [tmp_path / "a"], tmp_path / "f.npz", layer=0, left_out=said.append)
    assert len(said) == 1 and "bad.wav" in said[0]
    with pytest.raises(UserError, match="is given twice"):
        names("a", "a/1.wav")


def test_other_callers_of_extract_get_errors(audio: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no audio files are given"):
        extract("transformer-debug", [], tmp_path / "f.npz")


def test_threads_share_a_model_which_is_left_as_it_is(tmp_path: Path) -> None:
    """Windows of normalized audio change the configuration and the extractor's norm: of a copy."""
    soundfile.write(tmp_path / "long.wav", tone(24.0), 16_000)
    soundfile.write(tmp_path / "short.wav", tone(1.0, seed=1), 16_000)
    files = [tmp_path / "long.wav", tmp_path / "short.wav"]
    shared = model(extractor_mode="default", normalize=True)
    extract(shared, files, tmp_path / "alone.npz", window=20)
    shared.train()
    config, modules = shared.config, list(shared.modules())
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: extract(shared, files, tmp_path / f"{number}.npz", window=20), range(4)))
    assert shared.config is config and list(shared.modules()) == modules and all(module.training for module in modules)
    with np.load(tmp_path / "alone.npz") as alone:
        for number in range(4):
            with np.load(tmp_path / f"{number}.npz") as found:
                assert all(np.array_equal(found[key], alone[key]) for key in alone.files)
