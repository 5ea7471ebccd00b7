"""Extract features: from samples in memory, from an audio file of any rate, and from many files at once."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch

import hubert_eff
from hubert_eff.inference import extract


def tones(seconds: float, rate: int, first: float) -> np.ndarray:
    """A sound that glides from one pitch to twice that pitch, as samples (S,)."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * first * (time + time**2 / (2 * seconds)))).astype(np.float32)


model = hubert_eff.build("conformer-debug").eval()  # random weights; hubert_eff.load reads trained ones

# samples in memory: the last hidden state, then all of them
wav = tones(1.0, 16_000, 200.0)
last = hubert_eff.features(model, wav, rate=16_000)
states = hubert_eff.features(model, wav, rate=16_000, layer=None)
print("last state (T, D):", tuple(last.shape), "  all states (L + 1, T, D):", tuple(states.shape))
assert torch.equal(states[-1], last)

with tempfile.TemporaryDirectory() as folder:
    files = [Path(folder) / f"{name}.wav" for name in ("low", "middle", "high")]
    for file, first in zip(files, (100.0, 200.0, 400.0)):
        soundfile.write(file, tones(1.5, 16_000, first), 16_000)

    # one file
    print("one file (T, D):", tuple(hubert_eff.features(model, files[0]).shape))

    # many files, written to one archive; long recordings are computed in windows
    out = Path(folder) / "features.npz"
    for recording in extract(model, files, out, layer=2):
        print(f"{recording.key}: {recording.seconds} s, {recording.frames} frames")
    with np.load(out) as arrays:
        print({name: arrays[name].shape for name in arrays.files})
