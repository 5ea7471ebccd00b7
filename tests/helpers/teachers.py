"""Encoders of other packages with random weights: folders of transformers, and a toy at any rate that entry points name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .foreign import KINDS, SIZES, shaken
from .paths import ROOT

# kind of a folder -> class of transformers, kind of `foreign.KINDS`
FOLDERS = {
    "hubert": ("Hubert", "base"),
    "wav2vec2": ("Wav2Vec2", "large"),
    "wavlm": ("WavLM", "base"),
    "wavlm-large": ("WavLM", "large"),
    "data2vec": ("Data2VecAudio", "post-norm-layer"),
}
HERE = "tests.helpers.teachers"


def folder(path: Path, kind: str, **keys: Any) -> Any:
    """Save a model of transformers and its preprocessing; returns its encoder."""
    import transformers

    if kind == "whisper":
        return _whisper(path, **keys)
    name, form = FOLDERS[kind]
    sizes = {**SIZES, **KINDS[form], **keys}
    if kind == "data2vec":
        sizes = {key: value for key, value in sizes.items() if key not in ("feat_extract_norm", "feat_proj_layer_norm")}
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    shaken(model)
    model.save_pretrained(path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=form == "large").save_pretrained(path)
    return model


def _whisper(path: Path, seconds: int = 2, **keys: Any) -> Any:
    """Windows of two seconds."""
    import transformers

    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 8}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 20, "max_target_positions": 10}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    torch.manual_seed(0)
    config = transformers.WhisperConfig(**{**sizes, **decoder, **tokens, "max_source_positions": 50 * seconds, **keys})
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.save_pretrained(path)
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=seconds).save_pretrained(path)
    return model.model.encoder


class Toy(nn.Module):
    """State 0 knows nothing of the audio but single samples, state 1 is a log spectrum of windows of 25 ms."""

    passes = 0

    def __init__(self, rate: int) -> None:
        super().__init__()
        self.hop = 16_000 // rate

    def forward(self, wav: Tensor) -> list[Tensor]:
        Toy.passes += 1
        windows = wav.unfold(1, 400, self.hop)  # (B, T, 400)
        spectrum = torch.fft.rfft(windows * torch.hann_window(400)).abs()[..., :160]
        return [torch.frac(1e4 * windows[..., :4]), spectrum.unflatten(-1, (20, 8)).mean(-1).clamp(min=1e-3).log()]


def open_toy(name: str) -> Toy:
    return Toy(int(name))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry points of pyproject.toml and `toy:RATE`, as an installation declares them."""
    tomllib = pytest.importorskip("tomllib")
    group = "hubert_eff.teachers"
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    lines = [f"{name} = {value}" for name, value in {**points, "toy": f"{HERE}:open_toy"}.items()]
    info = tmp_path / "site" / "declared-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 1\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
