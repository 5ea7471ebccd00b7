"""The common part of the generated data sets: atomic folders, voices, recordings, shares of the time, noise."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from hubert_eff.config import SAMPLE_RATE
from hubert_eff.data.synthetic import sentences as demo
from hubert_eff.data.synthetic.espeak import Speech, Voice
from hubert_eff.errors import UserError
from hubert_eff.utils.files import replacing, sync_to_disk, temporary_folder, write_json
from hubert_eff.utils.progress import progress

Audio = NDArray[np.float32]
RECORD = "corpus.json"
NOISES = {"white_noise": 0.0, "pink_noise": 1.0, "brown_noise": 2.0}  # power falls with frequency to this exponent
_FEMALE = ("f", "linda", "steph", "belinda", "Annie")  # beginnings of the names of espeak-ng's female variants


def keep_or_make(
    out: Path, folders: Sequence[str], arguments: Mapping[str, Any], write: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Have `write(draft)` make `folders`, move them from the draft to `out` when all is written, and note it in `out/corpus.json`.

    An existing data set with the same arguments is kept. Nothing is left of an interrupted one.

    Returns the arguments and what `write` returned. Raises `UserError` if `out` holds another data set under one of the names.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder for the corpora")
    entry = {**arguments, "folders": list(folders)}
    made = _read(out / RECORD)
    earlier = made.get(folders[0])
    present = [name for name in folders if (out / name).exists()]
    if earlier and len(present) == len(folders) and {key: earlier.get(key) for key in entry} == entry:
        return dict(earlier)
    if present:
        raise UserError(f"{out} holds another {folders[0]}: choose another folder, or remove {' and '.join(present)}")
    began = next(folder for folder in (out, *out.parents) if folder.exists())  # an interrupted corpus does not even leave its folder
    try:
        with temporary_folder(out / folders[0]) as draft:
            entry |= write(draft)
            sync_to_disk(draft)
            for name in folders:
                (draft / name).rename(out / name)
    finally:
        for folder in (out, *out.parents):
            if folder == began or any(folder.iterdir()):
                break
            folder.rmdir()
    write_json(out / RECORD, {**_read(out / RECORD), folders[0]: entry})
    return entry


def _read(record: Path) -> dict[str, Any]:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@dataclass
class Disk:
    """Writes the recordings of one data set, and counts them and their seconds."""

    root: Path
    advance: Callable[[int], None]
    files: int = 0
    seconds: float = 0.0

    def save(self, name: str, audio: NDArray[Any]) -> float:
        """Write 16-bit PCM, 16 kHz, mono, as WAV or FLAC by the suffix of `name`; returns the seconds written."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, sync=False) as file:  # reports a full disk
            sf.write(file, audio, SAMPLE_RATE, subtype="PCM_16")
        seconds = len(audio) / SAMPLE_RATE
        before = int(self.seconds)
        self.files, self.seconds = self.files + 1, self.seconds + seconds
        self.advance(int(self.seconds) - before)
        return seconds

    def summary(self) -> dict[str, Any]:
        """Number of recordings and their minutes."""
        return {"recordings": self.files, "recorded_minutes": round(self.seconds / 60, 2)}


@contextmanager
def disk(root: Path, minutes: float) -> Iterator[Disk]:
    """A `Disk` that reports progress toward `minutes` of speech."""
    with progress(root.name, max(1, round(minutes * 60)), "s of speech") as advance:
        yield Disk(root, advance)


def voices(count: int, name: str, seed: int, language: str = "") -> list[Voice]:
    """`count` different voices for the data set `name`; of one language if given, else of English accents."""
    chosen = demo.speakers(count, random.Random(f"{name} {seed}").randrange(2**31))
    return [replace(voice, language=language or voice.language) for voice in chosen]


def sex(voice: Voice) -> str:
    """`F` or `M`, by the sound of the voice's variant."""
    return "F" if voice.variant.startswith(_FEMALE) else "M"


def say(text: str, voice: Voice, rng: random.Random, levels: tuple[float, float] = (0.3, 0.8)) -> Speech:
    """A recording in which a voice says a text, a little differently each time in pitch, range and rate."""
    manner = replace(
        voice,
        pitch=min(99, max(0, voice.pitch + rng.randint(-5, 5))),
        pitch_range=min(99, max(0, voice.pitch_range + rng.randint(-10, 10))),
        rate=min(450, max(80, voice.rate + rng.randint(-12, 12))),
    )
    return demo.record(text, manner, rng.randrange(2**31), levels)


def shares(minutes: float, parts: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each part of a data set, by its share of the time."""
    whole = sum(parts.values())
    return {name: minutes * 60 * part / whole for name, part in parts.items()}


def divide(things: Sequence[Any], parts: Mapping[str, float]) -> dict[str, list[Any]]:
    """Divide things among parts by their shares, in order, at least one per part."""
    whole, left = sum(parts.values()), list(things)
    dealt: dict[str, list[Any]] = {}
    for index, (name, part) in enumerate(parts.items()):
        last = index == len(parts) - 1
        number = len(left) if last else min(max(1, round(len(things) * part / whole)), len(left) - (len(parts) - index - 1))
        dealt[name], left = left[:number], left[number:]
    return dealt


def noise(exponent: float, samples: int, rng: np.random.Generator) -> Audio:
    """Gaussian noise whose power falls with frequency to `exponent`, of standard deviation 1."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequency = np.maximum(np.fft.rfftfreq(samples, 1 / SAMPLE_RATE), 20.0)  # flat below 20 Hz
    audio = np.fft.irfft(spectrum * frequency ** (-exponent / 2), samples)
    return np.asarray(audio / audio.std(), dtype=np.float32)


def add_noise(audio: NDArray[Any], exponent: float, snr: float, rng: np.random.Generator) -> Audio:
    """The audio over noise, `snr` dB below its mean power."""
    level = np.sqrt(np.mean(audio**2)) * 10 ** (-snr / 20)
    return np.asarray(audio + level * noise(exponent, len(audio), rng), dtype=np.float32)


def scaled(audio: NDArray[Any], peak: float) -> Audio:
    """The audio with its highest sample at `peak`."""
    return np.asarray(audio * (peak / np.abs(audio).max()), dtype=np.float32)


def words_of(text: str) -> list[str]:
    """The words of a text as LibriSpeech writes them: capitals, no marks but the apostrophe."""
    kept = "".join(c for c in text.upper() if c.isalpha() or c in "' ")
    return kept.split()
