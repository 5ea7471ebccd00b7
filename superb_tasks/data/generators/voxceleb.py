"""SID and ASV: several recordings of each of many voices, laid out as VoxCeleb1.

    VoxCeleb1/{dev,test}/wav/SPEAKER/VIDEO/00001.wav    SPEAKER is id10001 to id11251; 16 kHz, mono; id10270 to id10309 stand in test
    VoxCeleb1/iden_split.txt                            SPLIT SPEAKER/VIDEO/00001.wav; 1 training, 2 validation, 3 test
    VoxCeleb1/voxceleb1_test_v2.txt                     1|0 SPEAKER/VIDEO/00001.wav SPEAKER/VIDEO/00001.wav; 1: the same speaker

Identification (SuperbSID, `downstream/voxceleb1`) divides the recordings of every speaker, in both folders, by the first list; a video is
whole in one split. Verification trains on all speakers of `dev` (SuperbASV: by that list; `downstream/sv_voxceleb1`: by the folder) and
is tested on pairs of the speakers in `test`. SuperbSID looks for the first list in its cache folder, SuperbASV for both: pass `VoxCeleb1`
itself, or copy them.
"""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from hubert_eff.config import SAMPLE_RATE
from hubert_eff.data.synthetic.sentences import sentence
from hubert_eff.utils.files import write_text

from .common import NOISES, Disk, add_noise, disk, keep_or_make, say, scaled, voices

FOLDER = "VoxCeleb1"
SPLIT_LIST, TRIAL_LIST = "iden_split.txt", "voxceleb1_test_v2.txt"
TRAIN_SPEAKERS, TEST_SPEAKERS = 18, 6
FIRST_TRAIN, FIRST_TEST = 10001, 10270
VIDEOS = (1, 1, 2, 3)  # the split of each video of a speaker, in turn
SNR = (15.0, 35.0)  # dB, of a video
TRIALS = 12  # of each kind, per recording of a test speaker at most
LEAST_SECONDS = 2.5  # S3PRL drops what is shorter than 2 s after trimming


def make(out: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Write the data set to `out`; about `minutes` of speech, the same share for every voice, at least a recording per video."""
    return keep_or_make(out, [FOLDER], {"minutes": minutes, "seed": seed}, lambda draft: _write(draft / FOLDER, minutes, seed))


def _write(root: Path, minutes: float, seed: int) -> dict[str, Any]:
    cast = voices(TRAIN_SPEAKERS + TEST_SPEAKERS, FOLDER, seed)
    numbers = [*range(FIRST_TRAIN, FIRST_TRAIN + TRAIN_SPEAKERS), *range(FIRST_TEST, FIRST_TEST + TEST_SPEAKERS)]
    usage: list[tuple[int, str]] = []
    with disk(root, minutes) as recorder:
        for number, voice in zip(numbers, cast):
            usage += _speaker(recorder, number, voice, minutes * 60 / len(cast), seed)
    write_text(root / SPLIT_LIST, "".join(f"{split} {path}\n" for split, path in usage))
    trials = _trials([path for _, path in usage if int(path[2:7]) >= FIRST_TEST], random.Random(f"{FOLDER} {seed} trials"))
    write_text(root / TRIAL_LIST, "".join(f"{label} {first} {second}\n" for label, first, second in trials))
    return {**recorder.summary(), "speakers": len(cast), "trials": len(trials)}


def _speaker(recorder: Disk, number: int, voice: Any, seconds: float, seed: int) -> list[tuple[int, str]]:
    """Rounds through the speaker's videos until the time is filled; each video has its own background noise and level."""
    rng = random.Random(f"{FOLDER} {seed} {number}")
    noisy = np.random.default_rng([seed, number])
    places = [(f"video{rng.randrange(10**6):06d}", float(noisy.choice(list(NOISES.values()))), noisy.uniform(*SNR)) for _ in VIDEOS]
    folder = f"id{number:05d}"
    usage: list[tuple[int, str]] = []
    start = recorder.seconds
    while len(usage) < len(VIDEOS) or recorder.seconds - start < seconds:
        turn, take = len(usage) % len(VIDEOS), len(usage) // len(VIDEOS) + 1
        video, exponent, snr = places[turn]
        audio = say(sentence(rng), voice, rng).audio
        while len(audio) < LEAST_SECONDS * SAMPLE_RATE:
            audio = np.concatenate([audio, say(sentence(rng), voice, rng).audio])
        path = f"{folder}/{video}/{take:05d}.wav"
        side = "test" if number >= FIRST_TEST else "dev"
        recorder.save(f"{side}/wav/{path}", scaled(add_noise(audio, exponent, snr, noisy), rng.uniform(0.3, 0.9)))
        usage.append((VIDEOS[turn], path))
    return sorted(usage, key=lambda entry: entry[1])


def _trials(paths: list[str], rng: random.Random) -> list[tuple[int, str, str]]:
    """As many pairs of one speaker as of two, in a random order."""
    pairs: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for first, second in combinations(paths, 2):
        pairs[first.split("/")[0] == second.split("/")[0]].append((first, second))
    number = min(TRIALS * len(paths), *map(len, pairs.values()))
    trials = [(int(same), *pair) for same in (True, False) for pair in rng.sample(pairs[same], number)]
    rng.shuffle(trials)
    return trials
