"""`hubert_eff.features`: hidden states of one recording in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import hubert_eff
from hubert_eff.errors import UserError
from hubert_eff.inference.extraction import extract


@pytest.fixture
def model() -> hubert_eff.models.hubert.HubertModel:
    torch.manual_seed(0)
    return hubert_eff.build("conformer-debug").train()


def wave(seconds: float, rate: int) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * 220 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def test_a_file_and_its_samples_give_what_extract_writes(model, tmp_path: Path) -> None:
    samples = wave(1.0, 8000)
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    extract(model, [tmp_path / "a.wav"], tmp_path / "out.npz")
    expected = torch.from_numpy(np.load(tmp_path / "out.npz")["a"])
    every = hubert_eff.features(model, tmp_path / "a.wav", layer=None)
    assert torch.equal(every, expected) and every.dtype == torch.float32
    assert torch.equal(hubert_eff.features(model, samples, 8000, layer=None), expected)
    assert torch.equal(hubert_eff.features(model, torch.from_numpy(samples).double(), 8000), expected[-1])
    assert torch.equal(hubert_eff.features(model, str(tmp_path / "a.wav"), layer=1), expected[1])
    assert model.training


def test_a_preset_and_samples_of_16_khz(model) -> None:
    assert hubert_eff.features("conformer-debug@0", wave(0.5, 16000)).shape == (24, 64)


@pytest.mark.parametrize(
    ("audio", "options", "said"),
    [
        (np.zeros((2, 16000), np.float32), {}, "(2, 16000)"),
        (np.zeros(16000, np.int16), {}, "these are int16 (16000,): divide int16 by 32768"),
        (["a.wav", Path("b.wav")], {}, "these are 2 names: for several files use hubert_eff.inference.extract"),
        (wave(1.0, 16000), {"rate": 0}, "rate=0 must be at least 1"),
        (wave(1.0, 16000), {"layer": 3}, "layer 3 is not there: this model has hidden states 0 to 2"),
        (wave(0.01, 16000), {}, "samples"),
        ("missing.wav", {}, "missing.wav"),
        ("missing.wav", {"rate": 8000}, "rate=8000 is for samples"),
    ],
)
def test_what_is_not_audio_is_one_line(model, audio, options, said: str) -> None:
    with pytest.raises(UserError) as raised:
        hubert_eff.features(model, audio, **options)
    assert said in str(raised.value) and "\n" not in str(raised.value)
