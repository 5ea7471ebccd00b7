"""One audio file: is it sound, and what is it as 16 kHz mono?"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..config import SAMPLE_RATE
from ..errors import missing_extra
from ..files import replacing

SUFFIXES = frozenset((".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"))
# audio by its name, but not decoded here
FOREIGN_SUFFIXES = frozenset(
    (".aac", ".aif", ".aiff", ".amr", ".au", ".caf", ".m4a", ".mka", ".mp4", ".raw", ".sph", ".webm", ".wma")
)
DIRECT_SUFFIXES = frozenset((".wav", ".flac", ".ogg"))  # what fairseq opens by itself, spelt exactly so
BLOCK = 1 << 18  # samples decoded at a time

Array = npt.NDArray[np.float32]


class Unusable(Exception):
    """A file that is left out; the message is the reason, in a few words."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a full decode of a file found: its rate (Hz), channels, frames (samples per channel) and peak of the mono mix."""

    rate: int
    channels: int
    frames: int
    peak: float

    @property
    def samples(self) -> int:
        """Length at 16 kHz."""
        return round(self.frames * SAMPLE_RATE / self.rate)


def check(path: Path, silent: bool = False) -> Checked:
    """Decode the whole file. Raises `Unusable` if it is empty, no audio, truncated, holds NaN or infinity, or (unless `silent`) only 0."""
    import soundfile

    try:
        if path.stat().st_size == 0:
            raise Unusable("zero bytes")
        _check_container(path)
        frames, peak = 0, 0.0
        with soundfile.SoundFile(path) as file:
            rate, channels, declared = file.samplerate, file.channels, file.frames
            for block in _blocks(file):
                frames += len(block)
                high = float(np.abs(block).max(initial=0.0))
                if not np.isfinite(high):
                    raise Unusable("NaN or infinite samples")
                peak = max(peak, high)
    except soundfile.LibsndfileError as error:
        raise Unusable(f"not readable as audio ({error.error_string.rstrip('.')})") from error
    except OSError as error:
        raise Unusable(f"not readable ({error.strerror})") from error
    if frames < declared < 1 << 40:  # a stream of unknown length declares a huge one
        raise Unusable(f"truncated: {frames / rate:.2f} of {declared / rate:.2f} s")
    if frames == 0:
        raise Unusable("no samples")
    if rate < 1000:
        raise Unusable(f"sample rate of {rate} Hz")
    if peak == 0.0 and not silent:
        raise Unusable("silent: every sample is zero")
    return Checked(rate, channels, frames, peak)


def read_mono(path: Path, checked: Checked, first: int = 0, frames: int | None = None) -> Iterator[Array]:
    """The file, or `frames` frames of it from `first` on, as 16 kHz mono in blocks; scaled down where the file's peak exceeds full scale.

    They have round(frames * 16000 / rate) samples in all.
    """
    frames = checked.frames - first if frames is None else frames
    gain = np.float32(1.0 / max(checked.peak, 1.0))
    left = round(frames * SAMPLE_RATE / checked.rate)
    for block in _resampled((b * gain for b in _blocks_of(path, first, frames)), checked.rate):
        block = np.clip(block[:left], -1.0, 1.0)  # the filter may overshoot
        left -= len(block)
        yield block
    if left > 0:  # the resampler's length may differ from the rounded one by a sample
        yield np.zeros(left, np.float32)


def write_flac(path: Path, blocks: Iterator[Array]) -> None:
    """Write 16 kHz mono blocks as a 16-bit FLAC file, as a whole."""
    import soundfile

    with replacing(path) as temporary, soundfile.SoundFile(temporary, "w", SAMPLE_RATE, 1, "PCM_16") as file:
        for block in blocks:
            file.write(block)


def _blocks(file: Any, frames: int = -1) -> Iterator[Array]:
    for block in file.blocks(BLOCK, frames=frames, dtype="float32", always_2d=True):
        yield block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]


def _blocks_of(path: Path, first: int, frames: int) -> Iterator[Array]:
    import soundfile

    with soundfile.SoundFile(path) as file:
        if first:
            file.seek(first)
        yield from _blocks(file, frames)


def _resampled(blocks: Iterator[Array], rate: int) -> Iterator[Array]:
    if rate == SAMPLE_RATE:
        yield from blocks
        return
    try:
        import soxr
    except ImportError as error:
        raise missing_extra("soxr", "data", "resampling") from error
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _check_container(path: Path) -> None:
    """Truncation that libsndfile passes over in silence: a file that ends before its own header says it does."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(4096)
        if start[:4] in (b"RIFF", b"RIFX") and start[8:12] == b"WAVE":
            _check_wav(file, ">" if start[:4] == b"RIFX" else "<", size)
        elif start[:4] == b"OggS":
            file.seek(max(0, size - (1 << 17)))  # a page holds less than 2**16 bytes
            _check_ogg(file.read())
        elif path.suffix.lower() == ".mp3":
            _check_mp3(start, size)


def _check_wav(file: IO[bytes], order: str, size: int) -> None:
    position = 12
    while position + 8 <= size:
        file.seek(position)
        name, length = struct.unpack(f"{order}4sI", file.read(8))
        if name == b"data":
            held = size - position - 8
            if held < length < 0x7FFFF000:  # larger ones are what a program that wrote to a pipe leaves there
                raise Unusable(f"truncated: {held} of {length} bytes of samples")
            return
        position += 8 + length + length % 2
    raise Unusable("truncated: no samples in the WAV file")


def _check_ogg(tail: bytes) -> None:
    page = tail[tail.rfind(b"OggS") :]
    # byte 5 of a page: flags, 4 is the last page of the stream; byte 26: number of segments, then their sizes
    if len(page) < 27 or not page[5] & 4 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
        raise Unusable("truncated: the Ogg stream has no end")


def _check_mp3(start: bytes, size: int) -> None:
    tag = max(start.find(b"Xing"), start.find(b"Info"))
    if tag < 0 or len(start) < tag + 16:
        return  # a stream without a length
    flags = int.from_bytes(start[tag + 4 : tag + 8], "big")
    if flags & 2:  # the length in bytes follows, after the number of frames where flag 1 is set
        at = tag + 8 + 4 * (flags & 1)
        length = int.from_bytes(start[at : at + 4], "big")
        if size < length:
            raise Unusable(f"truncated: {size} of {length} bytes")
