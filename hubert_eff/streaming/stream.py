"""Chunk-wise inference: audio goes in piece by piece, hidden states come out chunk by chunk, and memory is constant."""

# S samples at 16 kHz, T frames of 20 ms, D model dim

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import FRAME_STRIDE, SAMPLE_RATE
from ..errors import UserError, unknown
from ..layers.chunks import Chunks
from ..models.extractor import check_audio, check_samples, receptive_field
from ..models.hubert import HubertModel

# (chunk_size, left_chunks) of the modes in FusionFormer's table 2, in frames of 20 ms and chunks. The paper's front gives frames of
# 40 ms, so its 16-4 is as long as 32-4 here.
MODES: dict[str, tuple[int | None, int]] = {"16-4": (16, 4), "16-inf": (16, -1), "full": (None, -1)}


def parse_mode(text: str) -> tuple[int | None, int]:
    """(chunk_size, left_chunks) of a mode such as "16-4", "16-inf" or "full", which is (None, -1). Raises `UserError` for other texts."""
    if text in MODES:
        return MODES[text]
    size, _, left = text.partition("-")
    if not size.isdecimal() or not (left.isdecimal() or left == "inf"):
        raise unknown("mode (FRAMES-CHUNKS, such as 16-4, or 16-inf, or full)", text, MODES)
    return int(size), -1 if left == "inf" else int(left)


def mode_seconds(text: str) -> str:
    """A mode in words: the length of a chunk and of what it sees before it. Raises `UserError` as `parse_mode` does."""
    size, left = parse_mode(text)
    if size is None:
        return "the whole utterance"
    chunk = size * FRAME_STRIDE / SAMPLE_RATE
    return f"chunks of {chunk:g} s, with {'all' if left < 0 else f'{left * chunk:g} s'} before them"


@dataclass
class StreamState:
    """The state of a stream: samples that are not used up (1, S), number of frames so far, and what each module has kept."""

    model: str  # identifies the model and chunks
    samples: Tensor
    frames: int
    kept: dict[str, tuple[Tensor, ...]]

    @property
    def elements(self) -> int:
        """The count of numbers in the state."""
        return sum(part.numel() for part in self._tensors())

    @property
    def nbytes(self) -> int:
        """The size of the state in bytes."""
        return sum(part.nbytes for part in self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [self.samples, *(part for parts in self.kept.values() for part in parts)]


class StreamingModel:
    """One stream through a model that was built with `streaming=True` (chunks as in FusionFormer, Song et al. 2022).

    Its frames are those of `model.hidden_states(wav, chunk_size=chunk_size, left_chunks=left_chunks)[0][-1]`, however the audio is cut
    into pieces. A frame comes out as soon as the samples of its chunk are there. With finite `left_chunks` memory is constant in time.
    Several streams may share a model.

    Args:
        model: the model, which is set to eval mode.
        chunk_size: frames of 20 ms in a chunk.
        left_chunks: how many chunks before its own a frame attends to; -1 for all.

    Raises:
        UserError: the model cannot stream, or not in such chunks.
    """

    def __init__(self, model: HubertModel, chunk_size: int = 16, left_chunks: int = 4) -> None:
        if not isinstance(model, HubertModel):
            raise UserError(f"cannot stream a {type(model).__name__}: expected a HubertModel")
        chunks = model.chunks(chunk_size, left_chunks)
        if chunks is None:
            raise UserError("chunk_size=None is the whole utterance: give a number of frames, or call model.hidden_states")
        self.model = model.eval()
        self._chunks: Chunks = chunks
        self._names: dict[nn.Module, str] = {module: name for name, module in model.encoder.named_modules()}
        self._modules = dict(model.encoder.named_modules())
        self._receptive = receptive_field(model.config.conv_layers)  # samples of one frame
        self._fingerprint = ""
        self.reset()

    def reset(self) -> None:
        """Begin a new stream."""
        # the extractor reads silence before the first sample
        self._samples = torch.zeros(1, self.model.feature_extractor.reach[0], device=self.model.mask_emb.device)
        self._frames = 0
        self._chunks = replace(self._chunks, kept={})

    @property
    def latency(self) -> float:
        """Seconds of audio from the first sample of a chunk until the chunk can be computed."""
        return ((self._chunks.size - 1) * FRAME_STRIDE + self._receptive + self.model.feature_extractor.reach[1]) / SAMPLE_RATE

    def feed(self, wav: Tensor) -> Tensor | None:
        """Take the next samples.

        Args:
            wav: audio (1, S) at 16 kHz, any number of samples.

        Returns:
            The frames (1, T, D) of the chunks that are now complete; None if there are none.

        Raises:
            UserError: the audio has another shape or dtype, or is not finite. The stream can go on afterwards.
        """
        if isinstance(wav, Tensor) and (wav.dim() != 2 or wav.size(0) != 1):
            raise UserError(f"a stream takes audio (1, samples), not {tuple(wav.shape)}")
        check_audio(wav)
        check_samples(wav, where="this piece")
        self._samples = torch.cat((self._samples, wav.to(self._samples)), 1)
        outputs = self._whole_chunks()
        return torch.cat(outputs, 1) if outputs else None

    def flush(self) -> Tensor | None:
        """End the stream. What is fed next begins a new one.

        Returns:
            The last frames (1, T, D); None if there are none.
        """
        before, behind = self.model.feature_extractor.reach
        self._samples = F.pad(self._samples, (0, behind))  # the extractor also reads silence after the last sample
        outputs = self._whole_chunks()
        if self.model.num_frames(self._samples.size(1) - before - behind):
            outputs.append(self._run(self._samples))
        self.reset()
        return torch.cat(outputs, 1) if outputs else None

    def _whole_chunks(self) -> list[Tensor]:
        size = self._chunks.size
        need = (size - 1) * FRAME_STRIDE + self._receptive + sum(self.model.feature_extractor.reach)
        outputs = []
        while self._samples.size(1) >= need:
            outputs.append(self._run(self._samples[:, :need]))
            self._samples = self._samples[:, size * FRAME_STRIDE :].clone()
        return outputs

    @torch.no_grad()
    def _run(self, samples: Tensor) -> Tensor:
        x = self.model.project(self.model.feature_extractor.of_padded(samples))
        y: Tensor = self.model.encoder(x, chunks=replace(self._chunks, start=self._frames))
        self._frames += y.size(1)
        return y

    # -- a stream that pauses ----------------------------------------------------------------------------------------

    def state(self) -> StreamState:
        """Return where this stream stands, so that `restore` can continue from there.

        Returns:
            What the stream has kept; it fits every `StreamingModel` of the same weights and chunks.
        """
        kept = {self._names[module]: parts for module, parts in (self._chunks.kept or {}).items()}
        return StreamState(self._identity(), self._samples, self._frames, kept)

    def restore(self, state: StreamState) -> None:
        """Continue from a state.

        Args:
            state: what `state` returned.

        Raises:
            UserError: the state belongs to a model of other weights, or to other chunks.
        """
        if state.model != self._identity():
            raise UserError(
                "this state is of another model, or of other chunks: a stream continues only with the weights, chunk_size and "
                "left_chunks that it began with"
            )
        self._samples, self._frames = state.samples, state.frames
        self._chunks = replace(self._chunks, kept={self._modules[name]: parts for name, parts in state.kept.items()})

    def _identity(self) -> str:
        if not self._fingerprint:
            config = json.dumps(self.model.config.to_dict(), sort_keys=True)
            digest = hashlib.sha256(f"{config} {self._chunks.size} {self._chunks.left} {self.model.fused}".encode())
            for name, weight in self.model.state_dict().items():
                if isinstance(weight, Tensor):
                    digest.update(f"{name} {float(weight.double().sum())} {float(weight.double().square().sum())}".encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint
