"""Computes features to cluster: MFCC with deltas (100 Hz), or hidden states of a trained encoder (50 Hz).

An utterance of S samples at 16 kHz has

    1 + (S - 400) // 160   MFCC frames          (a frame is a window of 25 ms that lies inside the audio)
    1 + (S - 400) // 320   frames of an encoder (a frame is a receptive field of 25 ms, likewise)

so the labels end at most 15 ms, or 20 ms, before the audio. Frame i is centered at i / rate + 12.5 ms in both. `labels.teachers` lists the
encoders and says how those of other rates come to 50 Hz.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..config import FRAME_STRIDE, SAMPLE_RATE
from ..errors import UserError, missing_extra

if TYPE_CHECKING:
    from torch import Tensor

    from .teachers import Teacher

MFCC_RATE = 100.0
MFCC_STRIDE = SAMPLE_RATE // 100
WINDOW = 400  # samples: 25 ms
CENTER = WINDOW / 2 / SAMPLE_RATE  # seconds from the start of a frame to its middle
MFCC_CHUNK = 30_000  # frames computed at a time (5 min), which bounds the memory for long recordings

Array = npt.NDArray[np.float32]


class Extractor(Protocol):
    """Computes the features of utterances. `rate` is in frames per second; `heavy` says that several threads help."""

    rate: float
    heavy: bool

    def identity(self) -> dict[str, Any]:
        """The settings that decide the features, for labels.json and for telling runs apart."""

    def frames(self, samples: int) -> int:
        """Number of frames of an utterance of `samples` samples; 0 if it is too short."""

    def extract(self, audio: list[Array]) -> Iterator[tuple[int, Array]]:
        """Yield (index, features (frames, dim)) of each utterance, in any order."""


@dataclass(frozen=True)
class FeatureSource:
    """A description of the features that can be sent to other processes.

    Args:
        checkpoint: a trained encoder, see `labels.teachers`; None is MFCC.
        layer: hidden state, 0 (input of the first block) to the number of layers; several, or () for all, for `HiddenLayer.extract_all`.
        device: torch device of the encoder.
        batch_seconds: audio per forward pass.
    """

    checkpoint: str | None = None
    layer: int | tuple[int, ...] | None = None
    device: str = "cpu"
    batch_seconds: float = 60.0

    def open(self) -> Extractor:
        """Load the extractor. Raises `UserError` for an encoder that cannot be read, a missing layer or an invalid device."""
        if self.checkpoint is None:
            return Mfcc()
        if self.layer is None:
            raise UserError("--checkpoint needs --layer: the hidden state to cluster, e.g. 6 of 12")
        return HiddenLayer(self.checkpoint, self.layer, self.device, self.batch_seconds)


class Mfcc:
    """13 MFCC with deltas and delta-deltas, 39 dimensions, with Kaldi's windows, as in HuBERT's first iteration."""

    rate = MFCC_RATE
    heavy = False

    def __init__(self) -> None:
        try:
            import torchaudio.compliance.kaldi  # noqa: F401
        except ImportError as error:
            raise missing_extra("torchaudio", "data", "MFCC") from error

    def identity(self) -> dict[str, Any]:
        return {"source": "mfcc", "checkpoint": None, "checkpoint_sha256": None, "layer": None}

    def frames(self, samples: int) -> int:
        return max(0, 1 + (samples - WINDOW) // MFCC_STRIDE)

    def extract(self, audio: list[Array]) -> Iterator[tuple[int, Array]]:
        import torch

        for index, wav in enumerate(audio):
            with torch.no_grad():
                yield index, self._one(torch.from_numpy(wav)).numpy()

    def _one(self, wav: Tensor) -> Tensor:  # (S,) -> (T, 39)
        import torch
        from torchaudio.compliance.kaldi import mfcc
        from torchaudio.functional import compute_deltas

        static = torch.cat(
            [
                mfcc(wav[None, start:end], sample_frequency=SAMPLE_RATE, use_energy=False)
                for start, end in chunks(len(wav), self.frames(len(wav)), MFCC_STRIDE, WINDOW, MFCC_CHUNK)
            ]
        ).T  # (13, T)
        delta = compute_deltas(static)
        return torch.cat([static, delta, compute_deltas(delta)]).T.contiguous()


class HiddenLayer:
    """A hidden state of an encoder, or several from one pass, at 50 Hz; valid frames only.

    Utterances of different lengths share a batch only where padding changes nothing (`Teacher.pads`): of this package's models with the
    layer_norm extractor and its own rule of valid frames. Otherwise (GroupNorm over time, stock checkpoints) only utterances of equal
    length do.
    """

    rate = SAMPLE_RATE / FRAME_STRIDE
    heavy = True

    def __init__(self, checkpoint: str, layer: int | Sequence[int], device: str, batch_seconds: float) -> None:
        import torch

        from .teachers import open_teacher

        teacher: Teacher = open_teacher(checkpoint)
        self.layers = (layer,) if isinstance(layer, int) else tuple(layer) or tuple(range(teacher.depth + 1))
        teacher.check_layers(self.layers, "--layer" if isinstance(layer, int) else "--layers")
        try:
            self.device = torch.device(device)
            self.teacher = teacher.to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
        self.batch_samples = int(batch_seconds * SAMPLE_RATE)

    def identity(self) -> dict[str, Any]:
        """The settings, for an encoder at another rate including that rate and what was done to its frames."""
        from ..checkpoints.open import digest_of
        from .teachers import RATES, weights_digest

        name = self.teacher.name
        rates = sorted({self.teacher.rates[layer] for layer in self.layers} - {self.rate})
        changed = {"teacher_rate": rates[0], "teacher_frames": RATES[rates[0]]} if rates else {}
        return {
            "source": "checkpoint",
            "checkpoint": str(Path(name).absolute()) if Path(name).exists() else name,
            "checkpoint_sha256": digest_of(name) or weights_digest(name, self.teacher),
            "layer": self.layers[0] if len(self.layers) == 1 else list(self.layers),
            **changed,
        }

    def frames(self, samples: int) -> int:
        return self.teacher.frames(samples)

    def extract(self, audio: list[Array]) -> Iterator[tuple[int, Array]]:
        for index, states in self.extract_all(audio):
            yield index, states[0]

    def extract_all(self, audio: list[Array]) -> Iterator[tuple[int, list[Array]]]:
        """Yield (index, (frames, dim) of each layer) of each utterance, in any order."""
        import torch

        if self.teacher.eps is not None:
            audio = [self.teacher.normalized(torch.from_numpy(wav)[None])[0].numpy() for wav in audio]
        pieces: dict[int, list[list[Array]]] = {}  # pieces of long recordings that are not complete yet
        for batch in self._batches(audio):
            length = max(end - start for _, start, end in batch)
            wav = torch.zeros(len(batch), length)
            padding = torch.ones(len(batch), length, dtype=torch.bool)
            for row, (index, start, end) in enumerate(batch):
                wav[row, : end - start] = torch.from_numpy(audio[index][start:end])
                padding[row, : end - start] = False
            with torch.no_grad():
                mask = padding.to(self.device) if bool(padding.any()) else None
                states = self.teacher.states(wav.to(self.device), mask, self.layers)
            values = [state.float().cpu().numpy() for state in states]
            for row, (index, start, end) in enumerate(batch):
                pieces.setdefault(index, []).append([value[row, : self.frames(end - start)].copy() for value in values])
                if end == len(audio[index]):  # the last piece
                    yield index, [np.concatenate(parts) for parts in zip(*pieces.pop(index), strict=True)]

    def _batches(self, audio: list[Array]) -> Iterator[list[tuple[int, int, int]]]:
        """Batches of (utterance, start, end), longest first; pieces of one utterance stay in order."""
        teacher = self.teacher
        items = [
            (index, start, end)
            for index in sorted(range(len(audio)), key=lambda i: -len(audio[i]))
            for start, end in chunks(len(audio[index]), self.frames(len(audio[index])), FRAME_STRIDE, teacher.window, teacher.piece)
        ]
        batch: list[tuple[int, int, int]] = []
        for item in items:
            lengths = [end - start for _, start, end in [*batch, item]]
            full = max(teacher.least, *lengths) * len(lengths) > self.batch_samples
            if batch and (full or (not teacher.pads and lengths[-1] != lengths[0])):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch


def chunks(samples: int, frames: int, stride: int, window: int, most: int) -> Iterator[tuple[int, int]]:
    """(start, end) in samples of pieces of at most `most` frames. Together they have exactly `frames` frames and cover the audio."""
    for first in range(0, frames, most):
        last = first + most
        yield first * stride, samples if last >= frames else (last - 1) * stride + window
