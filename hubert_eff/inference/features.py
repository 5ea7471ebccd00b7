"""Hidden states of one recording, in memory."""

# S samples, T frames of 20 ms, L blocks, D model dim

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..checkpoints.open import open_model
from ..config import SAMPLE_RATE
from ..data.audio import Unusable, check, read_mono, resampled
from ..errors import UserError
from ..models.hubert import HubertModel
from ..utils.evaluating import evaluation_copy


def features(
    model: HubertModel | str | os.PathLike[str],
    audio: str | os.PathLike[str] | npt.NDArray[np.floating] | Tensor,
    rate: int | None = None,
    layer: int | None = -1,
) -> Tensor:
    """Compute the hidden states of one recording in one piece. For many files or long ones use `extract`.

    Args:
        model: a model, which is left as it is, or what `open_model` takes: a checkpoint, an export or a preset.
        audio: the path of an audio file of any rate, or samples (S,) of one channel, floats within [-1, 1].
        rate: the rate of the samples in Hz, 16,000 if left out; a file states its own.
        layer: the hidden state: 0 enters block 1, i leaves block i, -1 is the last one; None for all of them.

    Returns:
        float32 (T, D), or (L + 1, T, D) for all states, at 20 ms per frame, on the model's device.

    Raises:
        UserError: the file is missing or is not valid audio; the samples have another shape or type, are not finite or are shorter
            than a frame; the rate is below 1; or the model does not have the layer.
    """
    wav = torch.from_numpy(_samples(audio, rate)).unsqueeze(0)
    hubert = evaluation_copy(model) if isinstance(model, HubertModel) else open_model(model)
    depth = len(hubert.encoder.layers)
    if layer is not None and not -depth - 1 <= layer <= depth:
        raise UserError(f"layer {layer} is not there: this model has hidden states 0 to {depth}")
    with torch.inference_mode():
        states, _ = hubert.hidden_states(wav.to(next(hubert.parameters()).device))
        chosen = torch.stack(states)[:, 0] if layer is None else states[layer][0]
        return chosen.float()


def _samples(audio: str | os.PathLike[str] | npt.NDArray[np.floating] | Tensor, rate: int | None) -> npt.NDArray[np.float32]:
    """16 kHz mono samples (S,)."""
    if isinstance(audio, (str, os.PathLike)):
        if rate is not None:
            raise UserError(f"rate={rate} is for samples, but the file {os.fspath(audio)} states its own rate: leave it out")
        path = Path(audio)
        try:
            return np.concatenate(list(read_mono(path, check(path))))
        except Unusable as reason:
            raise UserError(f"{path}: {reason}") from reason
    if isinstance(audio, (list, tuple)) and any(isinstance(one, (str, os.PathLike)) for one in audio):
        raise UserError(f"one recording is needed, these are {len(audio)} names: for several files use hubert_eff.inference.extract")
    samples = audio.detach().cpu().numpy() if isinstance(audio, Tensor) else np.asarray(audio)
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        remedy = ": divide int16 by 32768" if samples.dtype == np.int16 else ""
        raise UserError(
            f"samples must be floats of the shape (S,), one channel within [-1, 1]; these are {samples.dtype} {samples.shape}{remedy}"
        )
    if rate is not None and rate < 1:
        raise UserError(f"rate={rate} must be at least 1 sample per second")
    return np.concatenate([*resampled(iter([samples.astype(np.float32)]), rate or SAMPLE_RATE)])
