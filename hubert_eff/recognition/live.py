"""Gives text while audio comes, by a stream and CTC prefix beam search, and reports latency and speed."""

# S samples at 16 kHz, T frames of 20 ms, D model dim

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import SAMPLE_RATE
from ..errors import UserError
from ..streaming.live import for_inference
from ..streaming.stream import StreamingModel, mode_seconds
from .ctc import PrefixBeam
from .model import Recognizer


@dataclass(frozen=True)
class Partial:
    """A text so far, at `seconds` of audio: `words` will not change, and `open` is the best guess of what follows."""

    seconds: float
    words: str
    open: str
    final: bool = False

    @property
    def text(self) -> str:
        """The whole text."""
        return " ".join(filter(None, (self.words, self.open)))


@dataclass(frozen=True)
class LiveReport:
    """The cost of a live text. Times are those of this process, from the arrival of a chunk's last sample to its text."""

    seconds: float  # of audio
    mode: str
    wait: float  # seconds of audio that a chunk's first sample waits for
    p50_ms: float
    p95_ms: float
    compute: float  # seconds, all chunks together

    @property
    def rtf(self) -> float:
        """Real-time factor: below 1 the text keeps up with the audio."""
        return self.compute / self.seconds

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "rtf": self.rtf}

    def __str__(self) -> str:
        return (
            f"{self.seconds:.1f} s in mode {self.mode} ({mode_seconds(self.mode)}): RTF {self.rtf:.4f}; text comes {self.p50_ms:.1f} ms "
            f"(p50), {self.p95_ms:.1f} ms (p95) after a chunk's last sample, and its first one waits {1e3 * self.wait:.0f} ms for it"
        )


class LiveTranscript:
    """One stream of audio as text. With finite `left_chunks` memory is constant except for the text itself.

    The final text is that of CTC prefix beam search on `StreamingModel`'s frames, however the audio is cut into pieces. Raises `UserError`
    for a model that cannot stream, or whose CTC layer has learned nothing.
    """

    def __init__(self, model: Recognizer, chunk_size: int = 16, left_chunks: int = 4, beam: int = 10) -> None:
        model.check_ctc()
        model.check_chunk(chunk_size)
        self.model = model.eval()
        self.stream = StreamingModel(model.hubert, chunk_size, left_chunks)
        self.beam = beam
        self._begin()

    def _begin(self) -> None:
        self.search = PrefixBeam(self.beam)
        self._words: list[str] = []
        self._letters: list[int] = []  # settled letters of a word that may continue
        self._samples = 0

    def feed(self, wav: Tensor) -> Partial | None:
        """Take the next samples (1, S); returns the text so far if a chunk is complete. Raises `UserError` as `StreamingModel.feed`."""
        frames = self.stream.feed(wav)
        self._samples += wav.size(1)
        return None if frames is None else self._heard(frames, final=False)

    def flush(self) -> Partial:
        """End the stream and return its whole text. What is fed next begins a new one."""
        frames = self.stream.flush()
        heard = self._heard(frames, final=True)
        self._begin()
        return heard

    @torch.inference_mode()
    def _heard(self, frames: Tensor | None, final: bool) -> Partial:
        alphabet = self.model.alphabet
        if frames is not None:
            self.search.feed(self.model.ctc_log_probs(self.model.for_heads(frames))[0])
        for letter in self.search.settle():
            if alphabet.spoken(letter)[1]:  # a word ends before it
                self._words += filter(None, [alphabet.text(self._letters)])
                self._letters = []
            self._letters.append(letter)
        self.search.settled.clear()
        rest = alphabet.text([*self._letters, *self.search.open_letters()])
        words = " ".join(self._words)
        return Partial(self._samples / SAMPLE_RATE, words, rest, final)


def live_text(
    model: Recognizer, pieces: Iterable[Tensor], mode: str, size: int, left: int, beam: int, show: Callable[[Partial], None]
) -> LiveReport:
    """Feed pieces of audio (1, S) and call `show` with every text that differs from the last one shown, and with the final one.

    The model is replaced by its form that runs fastest. Raises `UserError` for audio that is too short for a frame.
    """
    model.hubert.chunks(size, left)  # refused here, with the proper reason, rather than by `fuse`
    model.hubert = for_inference(model.hubert.eval())
    live = LiveTranscript(model, size, left, beam)
    times, last, samples = [], "", 0
    for piece in pieces:
        begin = time.perf_counter()
        heard = live.feed(piece)
        samples += piece.size(1)
        if heard is None:
            continue
        if heard.text != last:
            show(heard)
        last = heard.text
        times.append(time.perf_counter() - begin)
    if not model.hubert.num_frames(samples):
        raise UserError(f"{samples} samples are too few for one frame")
    begin = time.perf_counter()
    show(live.flush())
    times.append(time.perf_counter() - begin)
    milliseconds = 1e3 * torch.tensor(times, dtype=torch.float64)
    p50, p95 = torch.quantile(milliseconds, torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    return LiveReport(samples / SAMPLE_RATE, mode, live.stream.latency, p50, p95, sum(times))
