"""Keyword spotting and speaker identification on real speech: a pre-trained upstream, an untrained one, S3PRL's FBANK and MFCC.

    python benchmarks/learning/superb_fsdd.py $FSDD --upstream runs/speech-pretrain/checkpoint_best.pt --out runs/superb-fsdd

$FSDD is the Free Spoken Digit Dataset (Jakobovski and contributors, CC BY-SA 4.0): DIGIT_SPEAKER_INDEX.wav or .flac at any depth. By its
own convention the recordings of index 0 to 4 are the test set; here 5 to 7 validate, the rest trains: all speakers are in all three. It is
laid out, at 16 kHz, as

- Speech Commands v1: the ten digits stand in the folders of the ten keywords, since S3PRL knows no others; a digit said backwards is
  another word (`_unknown_`), noise made here is silence;
- VoxCeleb1: a speaker per id, one digit per recording.

Then `hubert-eff superb run --small` runs both tasks on each upstream, and `hubert-eff superb report` compares them. S3PRL's
`fbank` and `mfcc` take each utterance's mean away, which is all that the mean over time of SUPERB's heads could see: `fbank_no_cmvn` is the
fair peer.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from hubert_eff.config import SAMPLE_RATE
from hubert_eff.errors import UserError
from superb_tasks.data.generators.common import NOISES, noise, scaled
from superb_tasks.data.generators.speech_commands import KEYWORDS, NOISE, OTHER_WORDS, SILENCE, UNKNOWN, folders, split_of
from superb_tasks.data.layouts import SPEAKER_LIST, SPEAKERS, VOXCELEB

TEST, VALID = range(5), range(5, 8)
BACKWARDS = 4  # every so many recordings is said backwards too, so that other words are about as many as one keyword
SILENCES = 20
WORDS = dict(zip("0123456789", KEYWORDS, strict=True))


Recording = tuple[str, str, int]  # speaker, digit, index


def recordings(fsdd: Path) -> dict[Recording, Path]:
    """Recordings of all ten digits. Raises `UserError` where there are none."""
    found = {}
    for file in sorted(fsdd.rglob("*")):
        if match := re.fullmatch(r"(\d)_(\w+)_(\d+)\.(wav|flac)", file.name):
            found[match[2], match[1], int(match[3])] = file
    if {digit for _, digit, _ in found} != set(WORDS):
        raise UserError(f"{fsdd} has no DIGIT_SPEAKER_INDEX.wav or .flac of all ten digits: name the Free Spoken Digit Dataset")
    return found


def side_of(index: int) -> str:
    return "test" if index in TEST else "valid" if index in VALID else "train"


def read(file: Path) -> np.ndarray:
    """The samples of a recording at 16 kHz, (S,) float32."""
    audio, rate = sf.read(file, dtype="float32")
    return np.clip(soxr.resample(audio, rate, SAMPLE_RATE), -1, 1)


def write(found: Mapping[Recording, Path], sides: Mapping[Recording, str], out: Path) -> None:
    """Both layouts below `out`, of the recordings that have a side: train, valid or test."""
    root, test_root = folders(out)
    voices = root.parent / VOXCELEB
    numbers = dict(zip(sorted({speaker for speaker, _, _ in sides}), SPEAKERS))
    # an id of each speaker in each part: which one a file belongs to is a hash of what stands before _nohash_
    ids = {
        (speaker, side): next(name for name in (f"{speaker}{n}" for n in count()) if split_of(name) == side)
        for speaker in numbers
        for side in ("train", "valid", "test")
    }
    usage = []
    for position, ((speaker, digit, index), side) in enumerate(sides.items()):
        audio = read(found[speaker, digit, index])
        name = f"{ids[speaker, side]}_nohash_{index}.wav"
        places = [(root / WORDS[digit] / name, audio)]
        if side == "test":
            places.append((test_root / WORDS[digit] / name, audio))
        if position % BACKWARDS == 0:
            word = OTHER_WORDS[int(digit)]
            places.append((root / word / name, audio[::-1]))
            if side == "test":
                places.append((test_root / UNKNOWN / f"{word}_{name}", audio[::-1]))
        path = f"id{numbers[speaker]}/{side}{digit}/{index:05d}.wav"
        usage.append(f"{('train', 'valid', 'test').index(side) + 1} {path}\n")
        places.append((voices / "dev" / "wav" / path, audio))
        for target, samples in places:
            target.parent.mkdir(parents=True, exist_ok=True)
            sf.write(target, samples, SAMPLE_RATE, subtype="PCM_16")
    (voices / SPEAKER_LIST).write_text("".join(usage))
    generator = np.random.default_rng(0)
    for folder, number, seconds in ((root / NOISE, len(NOISES), 16), (test_root / SILENCE, SILENCES, 1)):
        folder.mkdir(parents=True)
        for index in range(number):
            exponent = list(NOISES.values())[index % len(NOISES)]
            quiet = scaled(noise(exponent, seconds * SAMPLE_RATE, generator), generator.uniform(0.01, 0.1))
            sf.write(folder / f"{index:03d}.wav", quiet, SAMPLE_RATE, subtype="PCM_16")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fsdd", type=Path, metavar="FSDD")
    parser.add_argument("--upstream", required=True, help="the pre-trained model: a checkpoint or an export")
    parser.add_argument("--untrained", default="conformer-debug@0", help="untrained counterpart of the model (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    try:
        found = recordings(args.fsdd)
    except UserError as error:
        parser.error(str(error))
    data = args.out / "data"
    if not data.is_dir():
        draft = args.out / "data.draft"
        shutil.rmtree(draft, ignore_errors=True)
        write(found, {key: side_of(key[2]) for key in found}, draft)
        draft.rename(data)
    runs = []
    for upstream in (args.upstream, args.untrained, "s3prl:fbank_no_cmvn", "s3prl:mfcc", "s3prl:fbank"):
        runs.append(args.out / re.sub(r"\W+", "-", upstream).strip("-"))
        words = ["--task", "ks,sid", "--upstream", upstream, "--data", data, "--out", runs[-1], "--small", "--cache", args.out / "cache"]
        subprocess.run([sys.executable, "-m", "hubert_eff.cli", "superb", "run", *map(str, words)], check=True)
    words = ["superb", "report", *map(str, runs), "--out", str(args.out / "report")]
    return subprocess.run([sys.executable, "-m", "hubert_eff.cli", *words]).returncode


if __name__ == "__main__":
    sys.exit(main())
