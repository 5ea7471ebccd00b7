"""SD: conversations of two voices that now and then speak at once, as Kaldi data directories like those made of LibriMix.

    diarization/{train,dev,test}/wav/RECORDING.wav      16 kHz, mono
    diarization/{train,dev,test}/wav.scp                RECORDING /absolute/path.wav
                                 reco2dur               RECORDING SECONDS
                                 segments               UTTERANCE RECORDING START END, in seconds
                                 utt2spk, spk2utt       UTTERANCE SPEAKER; SPEAKER UTTERANCE UTTERANCE ...
                                 rttm                   SPEAKER RECORDING 1 START DURATION <NA> <NA> SPEAKER <NA> <NA>

`downstream/diarization` reads the directories themselves, SuperbSD turns them into tables first (no spaces in any field, the path
included). `rttm` is the truth for scoring. Move the folder and the paths in wav.scp are wrong: make it again.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hubert_eff.config import SAMPLE_RATE
from hubert_eff.data.synthetic.espeak import Segment, Voice
from hubert_eff.data.synthetic.sentences import sentence
from hubert_eff.errors import UserError
from hubert_eff.utils.files import write_text

from .common import Disk, disk, divide, keep_or_make, say, scaled, shares, voices

FOLDER = "diarization"
SPLITS = {"train": 0.7, "dev": 0.12, "test": 0.18}
SPEAKERS = 18
TURNS = (3, 5)  # sentences of a recording
GAP = (-2.0, 0.4)  # seconds between two turns; negative: both speak
PAUSE = 0.3  # seconds of silence that end a segment

Named = tuple[str, Voice]


def make(out: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Write the data set to `out`; about `minutes` of recordings, no voice in two splits."""
    place = home(out)
    arguments = {"minutes": minutes, "seed": seed, "home": str(place)}  # moved elsewhere, it is another data set
    return keep_or_make(out, [FOLDER], arguments, lambda draft: _write(draft / FOLDER, place, minutes, seed))


def home(out: Path) -> Path:
    """Where the data set in `out` will lie. Raises `UserError` if that path holds a space: S3PRL cannot read such a wav.scp."""
    place = Path(out).resolve() / FOLDER
    if any(character.isspace() for character in str(place)):
        raise UserError(f"the data of sd cannot lie in '{place}': S3PRL takes no spaces in paths, choose another folder")
    return place


def _write(root: Path, home: Path, minutes: float, seed: int) -> dict[str, Any]:
    cast = [(f"spk{number:02d}", voice) for number, voice in enumerate(voices(SPEAKERS, FOLDER, seed), start=1)]
    seconds, speakers = shares(minutes, SPLITS), divide(cast, SPLITS)
    with disk(root, minutes) as recorder:
        for split in SPLITS:
            _split(recorder, split, home, speakers[split], seconds[split], random.Random(f"{FOLDER} {seed} {split}"))
    return {**recorder.summary(), "speakers": len(cast)}


def _split(recorder: Disk, split: str, home: Path, cast: Sequence[Named], seconds: float, rng: random.Random) -> None:
    lists: dict[str, list[str]] = defaultdict(list)
    spoken: dict[str, list[str]] = {name: [] for name, _ in cast}
    start, number = recorder.seconds, 0
    while number == 0 or recorder.seconds - start < seconds:
        number += 1
        recording = f"{split}{number:05d}"
        audio, segments = conversation(rng.sample(cast, 2), rng)
        length = recorder.save(f"{split}/wav/{recording}.wav", audio)
        lists["wav.scp"].append(f"{recording} {home / split / 'wav' / recording}.wav")
        lists["reco2dur"].append(f"{recording} {length:.4f}")
        for segment in sorted(segments, key=lambda s: (s.start, s.label)):
            utterance = f"{segment.label}-{recording}-{round(segment.start * 100):06d}-{round(segment.end * 100):06d}"
            lists["segments"].append(f"{utterance} {recording} {segment.start:.3f} {segment.end:.3f}")
            lists["utt2spk"].append(f"{utterance} {segment.label}")
            spoken[segment.label].append(utterance)
            span = f"{segment.start:.3f} {segment.end - segment.start:.3f}"
            lists["rttm"].append(f"SPEAKER {recording} 1 {span} <NA> <NA> {segment.label} <NA> <NA>")
    lists["spk2utt"] = [" ".join([name, *sorted(utterances)]) for name, utterances in spoken.items() if utterances]
    for name, lines in lists.items():
        ordered = lines if name == "rttm" else sorted(lines)  # Kaldi wants its lists sorted
        write_text(recorder.root / split / name, "".join(f"{line}\n" for line in ordered))


def conversation(pair: Sequence[Named], rng: random.Random) -> tuple[NDArray[np.float32], list[Segment]]:
    """Turns of two voices in alternation, some of them overlapping, and who speaks when (seconds; the label is the voice's name)."""
    turns: list[tuple[int, NDArray[np.float32]]] = []
    segments: list[Segment] = []
    free = {name: 0.0 for name, _ in pair}  # when each of them has finished
    end = rng.uniform(0.1, 0.6)
    for index in range(rng.randint(*TURNS)):
        name, voice = pair[index % 2]
        speech = say(sentence(rng), voice, rng)
        first, last = speech.words[0].start, speech.words[-1].end
        start = max(end + (rng.uniform(*GAP) if index else 0.0), free[name] + PAUSE, first)  # of the first word
        turns.append((round((start - first) * SAMPLE_RATE), speech.audio))
        for word in speech.words:
            begin, stop = word.start - first + start, word.end - first + start
            if segments and segments[-1].label == name and begin - segments[-1].end < PAUSE:
                segments[-1] = Segment(segments[-1].start, stop, name)
            else:
                segments.append(Segment(begin, stop, name))
        free[name] = end = start + last - first
    audio = np.zeros(max(offset + len(part) for offset, part in turns), dtype=np.float32)
    for offset, part in turns:
        audio[offset : offset + len(part)] += part
    return scaled(audio, rng.uniform(0.4, 0.9)), segments
