"""MFCC and hidden states of checkpoints."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import hubert_eff
from hubert_eff.exporting.safetensors import export
from hubert_eff.labels import features, teachers
from hubert_eff.labels.features import FeatureSource, HiddenLayer, Mfcc

from ..helpers.recordings import noise

pytest.importorskip("sklearn")
pytest.importorskip("torchaudio")


# ---- features


@pytest.mark.parametrize("samples", [400, 559, 560, 16000, 16321])
def test_mfcc_is_kaldis_with_deltas(samples) -> None:
    from torchaudio.compliance.kaldi import mfcc
    from torchaudio.functional import compute_deltas

    wav = noise(samples / 16000)
    [(index, got)] = Mfcc().extract([wav])
    assert index == 0 and got.shape == (1 + (samples - 400) // 160, 39) == (Mfcc().frames(samples), 39)
    static = mfcc(torch.from_numpy(wav)[None], sample_frequency=16000, use_energy=False)
    delta = compute_deltas(static.T).T
    expected = torch.cat([static, delta, compute_deltas(delta.T).T], 1)
    torch.testing.assert_close(torch.from_numpy(got), expected)


def test_features_of_long_audio_in_pieces_have_the_same_frames(checkpoint, monkeypatch) -> None:
    wav = noise(2.005)
    [(_, whole)] = Mfcc().extract([wav])
    monkeypatch.setattr(features, "MFCC_CHUNK", 60)
    [(_, pieces)] = Mfcc().extract([wav])
    np.testing.assert_allclose(pieces, whole, atol=1e-4)
    layer = FeatureSource(checkpoint, 0).open()
    monkeypatch.setattr(teachers.Teacher, "piece", 30)
    found = dict(layer.extract([wav, noise(0.3), noise(1.2)]))
    assert {i: len(f) for i, f in found.items()} == {0: 100, 1: 14, 2: 59}


def test_hidden_layer_does_not_depend_on_the_batch(checkpoint) -> None:
    audio = [noise(s, i) for i, s in enumerate((0.5, 1.3, 0.025, 0.9))]
    together = dict(FeatureSource(checkpoint, 2).open().extract(audio))
    model = hubert_eff.load(checkpoint)
    for index, wav in enumerate(audio):
        with torch.no_grad():
            states, _ = model.hidden_states(torch.from_numpy(wav)[None])
        np.testing.assert_allclose(together[index], states[2][0].numpy(), atol=2e-5)
        assert len(together[index]) == 1 + (len(wav) - 400) // 320


def test_group_norm_extractor_is_never_padded(tmp_path) -> None:
    """Its statistics over time would take in the padding: only equal lengths share a batch."""
    path = tmp_path / "model.safetensors"
    export(hubert_eff.build("transformer-debug", extractor_mode="default").eval(), path)
    layer = HiddenLayer(str(path), 1, "cpu", 60.0)
    audio = [noise(s, i) for i, s in enumerate((0.5, 0.8, 0.5))]
    assert sorted(len(b) for b in layer._batches(audio)) == [1, 2]
    with torch.no_grad():
        states, _ = layer.teacher.model.hidden_states(torch.from_numpy(audio[0])[None])
    np.testing.assert_allclose(dict(layer.extract(audio))[0], states[1][0].numpy(), atol=2e-5)


@pytest.mark.parametrize("preset", ["transformer-debug", "conformer-debug"])
def test_long_recordings_are_normalized_as_a_whole(tmp_path, monkeypatch, preset) -> None:
    """A quiet half and a loud half stay so, although each is a piece of its own."""
    path = tmp_path / "model.safetensors"
    export(hubert_eff.build(preset, normalize=True).eval(), path)
    wav = np.concatenate([0.01 * noise(0.605, 1), noise(0.6, 2)]) + np.float32(0.02)
    short = noise(0.3, 3)
    layer = HiddenLayer(str(path), 0, "cpu", 60.0)
    model = hubert_eff.load(str(path))
    with torch.no_grad():
        expected = [model.hidden_states(torch.from_numpy(w)[None])[0][0][0].numpy() for w in (wav, short)]
    found = dict(layer.extract([wav, short]))  # in one piece: the model's own normalization
    for index, values in enumerate(expected):
        np.testing.assert_allclose(found[index], values, atol=2e-5)
    whole = hubert_eff.models.hubert.normalize_waveform(torch.from_numpy(wav)[None])
    monkeypatch.setattr(teachers.Teacher, "piece", 30)
    pieces = list(features.chunks(len(wav), layer.frames(len(wav)), 320, 400, 30))
    assert len(pieces) == 2 and model.config.normalize
    model.config = dataclasses.replace(model.config, normalize=False)
    with torch.no_grad():
        parts = [model.hidden_states(whole[:, start:end])[0][0][0].numpy() for start, end in pieces]
    np.testing.assert_allclose(dict(layer.extract([wav, short]))[0], np.concatenate(parts), atol=2e-5)
