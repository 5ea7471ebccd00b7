"""Checks one audio file and reads it as 16 kHz mono."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..config import LOUDEST, SAMPLE_RATE
from ..errors import UnusableFile, missing_extra
from ..utils.files import replacing
from .containers import PADDING, check_container
from .containers import Unusable as Unusable  # for callers of `check`

SUFFIXES = frozenset((".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"))
# suffixes of audio that is not decoded here
FOREIGN_SUFFIXES = frozenset((".aac", ".aif", ".aiff", ".amr", ".au", ".caf", ".m4a", ".mka", ".mp4", ".raw", ".sph", ".webm", ".wma"))
DIRECT_SUFFIXES = frozenset((".wav", ".flac", ".ogg"))  # suffixes that fairseq opens itself, in exactly this spelling
FORMATS = frozenset(("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3"))  # formats whose containers are checked, whatever the name of the file
BLOCK = 1 << 18  # samples decoded at a time
WINDOW = 1 << 12  # frames of a window in which channels are compared
QUIETEST = 2.0**-24  # half a step of 24 bits
CANCELED = 1e-4  # share of the channels' power that the mono mix must keep: -40 dB
FEW = 0.05  # share of the windows with sound that may lose more

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Checked:
    """Result of decoding a whole file: rate (Hz), channels, frames (samples per channel), peak and mean square of the mono mix."""

    rate: int
    channels: int
    frames: int
    peak: float
    power: float

    @property
    def samples(self) -> int:
        """Length at 16 kHz."""
        return round(self.frames * SAMPLE_RATE / self.rate)

    @property
    def gain(self) -> float:
        """The factor that scales samples beyond full scale back to it."""
        return 1.0 / max(self.peak, 1.0)

    @property
    def bits(self) -> int:
        """Bits of a copy: more than 16 for whispers, and if single samples beyond full scale push down the rest."""
        return 16 if 2.0**-9 <= self.peak <= 2.0**9 else 24


def check(path: Path, silent: bool = False) -> Checked:
    """Decode the whole file. Raises `Unusable` if it cannot be used.

    That is, if it is not a regular file, is empty, truncated or not audio, has data behind what a decoder reads, holds NaN, infinity or
    other invalid samples, has channels that cancel each other in the mono mix, or (unless `silent`) is too quiet for 24 bits.
    """
    import soundfile

    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # opening a pipe would wait for its writer
            raise Unusable("a folder" if stat.S_ISDIR(state.st_mode) else "no regular file")
        if state.st_size == 0:
            raise Unusable("zero bytes")
        held = check_container(path)
        with _opened(path) as file:
            if file.format not in FORMATS:
                raise Unusable(f"format {file.format} under another name: convert it to wav or flac")
            rate, channels, declared = file.samplerate, file.channels, file.frames
            if rate < 1000:
                raise Unusable(f"sample rate of {rate} Hz")
            if held and abs(held - declared / rate) > PADDING:  # libsndfile guesses a length that the header lacks
                raise Unusable(
                    f"several streams in one file, or no length in its header: {declared / rate:.2f} instead of {held:.2f} s would be "
                    "read; convert it to flac as a whole"
                )
            found = _Measures(channels)
            for block in _raw_blocks(file):
                found.add(block)
    except soundfile.LibsndfileError as error:
        raise Unusable(_unreadable(error)) from error
    except FileNotFoundError as error:
        raise Unusable("not there") from error
    except OSError as error:
        raise Unusable(f"not readable ({error.strerror})") from error
    except ValueError as error:  # such as NUL in its name
        raise Unusable(f"not readable ({error})") from error
    frames = found.frames
    if frames < declared < 1 << 40:  # a stream of unknown length declares a huge one
        raise Unusable(f"truncated: {frames / rate:.2f} of {declared / rate:.2f} s")
    if frames == 0:
        raise Unusable("no samples")
    found.judge(silent)
    return Checked(rate, channels, frames, found.peak, found.power / frames)


class _Measures:
    """Loudness of the channels of a file and of their mono mix."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.frames, self.peak, self.power = 0, 0.0, 0.0
        self.loudest = 0.0  # of any channel
        self.sounding = self.canceled = 0  # windows

    def add(self, block: Array) -> None:
        """Add samples (T, C). Raises `Unusable` if they are not audio."""
        high = max(float(block.max()), -float(block.min()))
        if not np.isfinite(high):
            raise Unusable("NaN or infinite samples")
        if high > LOUDEST:
            raise Unusable(f"not audio: samples of up to {high:.0e}, which must be within -1 and 1")
        mono = _mono(block)
        self.frames += len(block)
        self.loudest = max(self.loudest, high)
        self.peak = max(self.peak, float(mono.max()), -float(mono.min()))
        self.power += float(mono @ mono)
        if self.channels == 1:
            return
        whole, of_mono = _powers(block), _powers(mono[:, None])
        sounds = whole > QUIETEST**2 * WINDOW * self.channels
        self.sounding += int(sounds.sum())
        self.canceled += int((sounds & (of_mono < CANCELED * whole / self.channels)).sum())

    def judge(self, silent: bool) -> None:
        """Raise `Unusable` if the mono mix is silent while the channels are not, or, unless `silent`, if all is silent."""
        if self.canceled > FEW * self.sounding:
            raise Unusable(
                f"channels cancel each other: in {100 * self.canceled / self.sounding:.0f}% of it the mono mix is 40 dB below them; "
                "write one channel to a file of its own"
            )
        if silent or self.peak >= QUIETEST:
            return
        if self.loudest == 0.0:
            raise Unusable("silent: every sample is zero")
        raise Unusable(f"silent: its peak of {self.loudest:.0e} is below what 24 bits can hold; amplify it")


def read_mono(path: Path, checked: Checked, first: int = 0, frames: int | None = None) -> Iterator[Array]:
    """Read the file, or `frames` frames of it from `first` on, as 16 kHz mono in blocks; scaled down if its peak exceeds full scale.

    They have round(frames * 16000 / rate) samples in all. Raises `UnusableFile`, naming the file, if it has changed since it was checked.
    """
    try:
        yield from decoded(path, checked, first, checked.frames - first if frames is None else frames)
    except Unusable as reason:
        raise UnusableFile(f"{path}: {reason}") from reason


def decoded(path: Path, checked: Checked, first: int, frames: int) -> Iterator[Array]:
    """Do what `read_mono` does, but raise `Unusable`."""
    import soundfile

    left = round(frames * SAMPLE_RATE / checked.rate)
    try:
        for block in resampled((b * np.float32(checked.gain) for b in _blocks_of(path, checked, first, frames)), checked.rate):
            block = np.clip(block[:left], -1.0, 1.0)  # the filter may overshoot
            left -= len(block)
            yield block
    except soundfile.LibsndfileError as error:
        raise Unusable(_unreadable(error, " any more")) from error
    except FileNotFoundError as error:
        raise Unusable("not there any more") from error
    if left > 0:  # the resampler's length may differ from the rounded one by a sample
        yield np.zeros(left, np.float32)


def write_flac(path: Path, blocks: Iterator[Array], bits: int = 16) -> int:
    """Write 16 kHz mono blocks to a FLAC file, which appears when it is complete; returns its size. Raises `WriteError` on a full disk."""
    import soundfile

    frames = 0
    with replacing(path) as temporary:
        with temporary.open("wb", buffering=0) as raw:
            target = _Target(raw)
            with soundfile.SoundFile(target, "w", SAMPLE_RATE, 1, f"PCM_{bits}", format="FLAC") as file:
                for block in blocks:
                    file.write(block)
                    frames += len(block)
                    target.check()
            target.check()
            size = raw.seek(0, os.SEEK_END)
        if size != target.size or soundfile.info(os.fsencode(temporary)).frames != frames:
            raise OSError(f"{path} is not what was written to it: the disk may be failing")
    return size


class _Target:
    """A file that remembers the error of a full disk, which libsndfile ignores."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size = file, 0
        self.error: OSError | None = None
        self.seek, self.tell = file.seek, file.tell

    def write(self, data: bytes) -> int:
        """Write as a file does; returns 0 if it fails."""
        view = memoryview(data)
        try:
            while view:
                view = view[self.file.write(view) :]
        except OSError as error:
            self.error = self.error or error
        self.size = max(self.size, self.tell())
        return len(data) - len(view)

    def check(self) -> None:
        """Raise the error, if there was one."""
        if self.error:
            raise self.error


def _opened(path: Path) -> Any:
    import soundfile

    return soundfile.SoundFile(os.fsencode(path))  # bytes, because soundfile encodes names strictly


def _unreadable(error: Any, still: str = "") -> str:
    said = error.error_string.removeprefix("Error : ").rstrip(".")
    return f"not readable as audio{still}" + (f" ({said})" if said else "")


def _raw_blocks(file: Any, frames: int = -1) -> Iterator[Array]:
    yield from file.blocks(max(1, BLOCK // file.channels), frames=frames, dtype="float32", always_2d=True)


def _mono(block: Array) -> Array:  # (T, C) -> (T,)
    mono: Array = block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]
    return mono


def _powers(block: Array) -> npt.NDArray[np.float64]:
    """Sums of squares of windows of samples (T, C); the last one may be shorter."""
    whole = len(block) // WINDOW * WINDOW
    windows = block[:whole].reshape(-1, WINDOW * block.shape[1])
    rest = block[whole:].ravel()
    return np.append(np.einsum("ij,ij->i", windows, windows), rest @ rest).astype(np.float64)


def _blocks_of(path: Path, checked: Checked, first: int, frames: int) -> Iterator[Array]:
    left = frames
    with _opened(path) as file:
        if (file.samplerate, file.channels) != (checked.rate, checked.channels) or file.frames < first + frames:
            raise Unusable("it has changed since it was checked")
        if first:
            file.seek(first)
        for block in _raw_blocks(file, frames):
            left -= len(block)
            yield _mono(block)
    if left:
        raise Unusable("it has changed since it was checked")


def resampled(blocks: Iterator[Array], rate: int) -> Iterator[Array]:
    """Resample mono blocks of another rate to 16 kHz. Raises `UserError` if soxr is needed and not installed."""
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
