"""Small recognizers, their checkpoints, and what brute force gives."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import torch

from hubert_eff.encoders.registry import preset_config
from hubert_eff.recognition import Recognizer, RecognizerConfig

LETTERS = "|ABC"


def make(
    preset: str = "conformer-debug", decoder_layers: int = 0, norm: str = "layer_norm", decoder: str = "transformer", **keys: float
) -> Recognizer:
    config = RecognizerConfig(
        letters=LETTERS, decoder_type=decoder, decoder_layers=decoder_layers, decoder_norm=norm, decoder_ffn_embed_dim=32,
        decoder_attention_heads=2,
    )  # fmt: skip
    config.describe(preset_config(preset, **keys))
    return Recognizer(config)


def save(model: Recognizer, path: Path) -> Path:
    """As fairseq's trainer does."""
    name = "hubert_eff_aed" if model.decoder is not None else "hubert_eff_ctc"
    settings = {"_name": name, "w2v_path": None, "preset": None, "mask_prob": 0.1, **vars(model.config)}
    torch.save({"cfg": {"model": settings, "task": {}}, "model": model.state_dict(), "optimizer_history": [{"num_updates": 3}]}, path)
    return path


def every_text_score(log_probs: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Sums over all label paths, by brute force."""
    scores: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(log_probs.size(1)), repeat=log_probs.size(0)):
        text = tuple(label for label, _ in itertools.groupby(path) if label)
        score = float(sum(log_probs[t, label] for t, label in enumerate(path)))
        scores[text] = np.logaddexp(scores.get(text, -math.inf), score)
    return scores
