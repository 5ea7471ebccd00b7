"""KS: the layout of Speech Commands v1, checked, and a synthetic stand-in for it.

    speech_commands_v0.01/WORD/SPEAKER_nohash_NUMBER.wav        1 s, 16 kHz, mono; thirty words
    speech_commands_v0.01/_background_noise_/NAME.wav           noise, longer
    speech_commands_v0.01/{validation,testing}_list.txt         WORD/SPEAKER_nohash_NUMBER.wav
    speech_commands_test_set_v0.01/CLASS/*.wav                  the ten keywords, _unknown_, _silence_

The speakers of the first folder fall into training, validation and test by a hash of their id, which begins each file name. Files of test
speakers are left out of it when training; they stand again in the second folder, sorted into the twelve classes of the task (Warden
2018, section 7). `s3prl.dataio.corpus.SpeechCommandsV1` (SuperbKS) and `downstream/speech_commands` read both folders.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from hubert_eff.config import SAMPLE_RATE
from hubert_eff.data.synthetic.espeak import Voice, speak
from hubert_eff.errors import UserError
from hubert_eff.utils.files import write_text

from .common import NOISES, Audio, Disk, disk, keep_or_make, noise, scaled

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
OTHER_WORDS = (
    "bed", "bird", "cat", "dog", "eight", "five", "four", "happy", "house", "marvin", "nine", "one", "seven", "sheila", "six",
    "three", "tree", "two", "wow", "zero",
)  # fmt: skip
UNKNOWN, SILENCE, NOISE = "_unknown_", "_silence_", "_background_noise_"
TRAIN_FOLDER, TEST_FOLDER = "speech_commands_v0.01", "speech_commands_test_set_v0.01"
LANGUAGES = ("en-us", "en-us-nyc", "en", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5", "klatt", "klatt3", "Andrea")
NOISE_SECONDS = 16
SNR = (20.0, 40.0)  # dB, of a recording
SPEAKERS = 10
PER_MINUTE = 4  # recordings of each keyword in a minute: ten keywords, and twenty other words with a quarter of that


def split_of(file_name: str) -> str:
    """`valid`, `test` or `train`: the side of the speaker of a recording, by the data set's own rule.

    The percentage is SHA-1 of what stands before `_nohash_`, modulo 2^27; below 10 is validation, below 20 test.
    """
    speaker = file_name.split("_nohash_")[0]
    digest = int(hashlib.sha1(speaker.encode()).hexdigest(), 16)
    percentage = digest % 2**27 * 100 / (2**27 - 1)
    return "valid" if percentage < 10 else "test" if percentage < 20 else "train"


# -- a corpus somebody has -------------------------------------------------------------------------------------------


def check_keywords(root: Path, test_root: Path) -> None:
    """Raise `UserError` unless both folders are laid out as S3PRL's keyword spotting reads them. Takes a second for the real set."""
    missing = [word for word in KEYWORDS if not _recordings(root / word)]
    if missing:
        raise UserError(f"{root} is not a Speech Commands training folder: no recordings in {', '.join(missing)}")
    if not any(_recordings(folder) for folder in root.iterdir() if folder.name not in (*KEYWORDS, NOISE)):
        raise UserError(f"{root} has keywords only: the class {UNKNOWN} needs folders of other words")
    noises = _recordings(root / NOISE)
    if not noises:
        raise UserError(f"{root} has no recordings in {NOISE}, of which the class {SILENCE} is made")
    for recording in noises:
        try:
            seconds = sf.info(recording).duration
        except sf.LibsndfileError as error:
            raise UserError(f"{recording} is not audio: {error}") from error
        if seconds < 1:
            raise UserError(f"{recording} lasts {seconds:.2f} s: background noise must last a second or more")
    sides = {split_of(wav.name) for word in KEYWORDS for wav in _recordings(root / word)}
    if not {"train", "valid"} <= sides:
        empty = " and ".join(sorted({"train", "valid"} - sides))
        raise UserError(f"{root}: no speaker falls into {empty} by the hash of the file names, SPEAKER_nohash_NUMBER.wav")
    missing = [name for name in (*KEYWORDS, UNKNOWN, SILENCE) if not _recordings(test_root / name)]
    if missing:
        raise UserError(f"{test_root} is not a Speech Commands test folder: no recordings in {', '.join(missing)}")
    more = {folder.name for folder in test_root.iterdir() if folder.is_dir()} - {*KEYWORDS, UNKNOWN, SILENCE}
    if more:
        raise UserError(f"{test_root} holds {', '.join(sorted(more))}, which is not one of the twelve classes: is it the training folder?")


def _recordings(folder: Path) -> list[Path]:
    """The wav files of a folder, in order; an empty one is an error."""
    files = sorted(folder.glob("*.wav"))
    for file in files:
        if file.stat().st_size <= 44:  # a header without samples
            raise UserError(f"{file} holds no audio: remove it")
    return files


def folders(data: Path) -> tuple[Path, Path]:
    """The training and the test folder under a folder that holds both, by the names of their archives."""
    return Path(data) / TRAIN_FOLDER, Path(data) / TEST_FOLDER


# -- a corpus made here ----------------------------------------------------------------------------------------------


def make(out: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Write the data set to `out`; `minutes` of words, but each keyword at least once per speaker."""
    return make_keywords(out, seed, max(SPEAKERS, round(minutes * PER_MINUTE)), SPEAKERS)


def make_keywords(out: Path, seed: int = 0, per_word: int = 96, speakers: int = 24) -> dict[str, Any]:
    """Write a synthetic corpus of the layout of Speech Commands v1 to two folders in `out`; 1 s recordings, 16 kHz mono.

    Each keyword has `per_word` recordings, each of twenty other words a quarter of that, shared evenly among the speakers. A speaker
    is an espeak-ng voice of its own; pitch, rate, level, position and background noise vary from one recording to the next. A
    sixth of the speakers (at least one) is kept for validation and a sixth for test. The same arguments give the same files;
    a corpus that is there already is kept.

    Returns the arguments, the names of the folders and `train`, `valid`, `test` (recordings of words per split).
    Raises `UserError` for a number of speakers outside 3 to 128, fewer recordings than speakers, and if `out` holds another corpus.
    """
    most = len(LANGUAGES) * len(VARIANTS)
    if not 3 <= speakers <= most:
        raise UserError(f"speakers={speakers} must lie between 3, one per split, and {most}")
    if per_word < speakers:
        raise UserError(f"per_word={per_word} leaves some of the {speakers} speakers without recordings: raise it to {speakers} or more")
    arguments = {"seed": seed, "per_word": per_word, "speakers": speakers}
    return keep_or_make(out, [TRAIN_FOLDER, TEST_FOLDER], arguments, lambda draft: _write(*folders(draft), seed, per_word, speakers))


def _write(root: Path, test_root: Path, seed: int, per_word: int, speakers: int) -> dict[str, Any]:
    """Write both folders; the number of recordings of words per split."""
    for name in (*KEYWORDS, *OTHER_WORDS, NOISE):
        (root / name).mkdir(parents=True)
    for name in (*KEYWORDS, UNKNOWN, SILENCE):
        (test_root / name).mkdir(parents=True)
    files: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    with disk(root, per_word / PER_MINUTE) as recorder:
        for number, (speaker, voice) in enumerate(_speakers(seed, speakers).items()):
            rng = np.random.default_rng([seed, int(speaker, 16)])
            dealt = 0  # recordings of all words, dealt out to the speakers in turn
            for word in (*KEYWORDS, *OTHER_WORDS):
                total = per_word if word in KEYWORDS else max(1, per_word // 4)
                first, dealt = (number - dealt) % speakers, dealt + total
                for take in range(len(range(first, total, speakers))):
                    name = f"{word}/{speaker}_nohash_{take}.wav"
                    recorder.save(name, _record(word, voice, rng))
                    files[split_of(Path(name).name)].append(name)
    rng = np.random.default_rng([seed, 1])
    for name, exponent in NOISES.items():
        recorder.save(f"{NOISE}/{name}.wav", _quiet_noise(exponent, NOISE_SECONDS * SAMPLE_RATE, rng))
    for side, name in (("valid", "validation_list.txt"), ("test", "testing_list.txt")):
        write_text(root / name, "".join(f"{file}\n" for file in sorted(files[side])))

    # the test folder: every keyword of the test speakers, and as many other words and silences as recordings of one keyword
    tested = [file for file in files["test"] if Path(file).parent.name in KEYWORDS]
    others = sorted(set(files["test"]) - set(tested))
    each = round(len(tested) / len(KEYWORDS))
    for file in tested:
        shutil.copy(root / file, test_root / file)
    rng = np.random.default_rng([seed, 2])
    for index in rng.choice(len(others), min(each, len(others)), replace=False):
        word, recording = Path(others[index]).parts
        shutil.copy(root / others[index], test_root / UNKNOWN / f"{word}_{recording}")
    silences = Disk(test_root, lambda _: None)
    for index in range(each):
        exponent = list(NOISES.values())[index % len(NOISES)]
        silences.save(f"{SILENCE}/{index:03d}.wav", _quiet_noise(exponent, SAMPLE_RATE, rng))
    return {**recorder.summary(), **{split: len(names) for split, names in files.items()}}


def _speakers(seed: int, count: int) -> dict[str, Voice]:
    """Ids of eight hexadecimal digits and their voices; a sixth of them, at least one, hashes into validation, as many into test."""
    held_out = max(1, round(count / 6))
    wanted = {"valid": held_out, "test": held_out, "train": count - 2 * held_out}
    rng = np.random.default_rng([seed, 0])
    voices = [(language, variant) for language in LANGUAGES for variant in VARIANTS]
    order = iter(rng.permutation(len(voices)))
    chosen: dict[str, Voice] = {}
    while len(chosen) < count:
        speaker = f"{rng.integers(2**32):08x}"
        side = split_of(speaker)
        if wanted[side] and speaker not in chosen:
            wanted[side] -= 1
            language, variant = voices[next(order)]
            chosen[speaker] = Voice(language, variant, pitch=int(rng.integers(25, 76)), rate=int(rng.integers(130, 200)))
    return chosen


def _record(word: str, voice: Voice, rng: np.random.Generator) -> Audio:
    """One second in which a voice says a word, somewhere, in its own way each time, over background noise."""
    manner = replace(
        voice,
        pitch=voice.pitch + int(rng.integers(-12, 13)),
        pitch_range=int(rng.integers(30, 71)),
        rate=voice.rate + int(rng.integers(-25, 26)),
    )
    speech = speak(word, manner, seed=int(rng.integers(2**31)))
    spoken = speech.audio[int(speech.words[0].start * SAMPLE_RATE) : int(speech.words[-1].end * SAMPLE_RATE)][:SAMPLE_RATE]
    background = noise(float(rng.choice(list(NOISES.values()))), SAMPLE_RATE, rng)
    audio = background * (np.sqrt(np.mean(spoken**2)) * 10 ** (-rng.uniform(*SNR) / 20))
    start = int(rng.integers(SAMPLE_RATE - len(spoken) + 1))
    audio[start : start + len(spoken)] += spoken
    return scaled(audio, rng.uniform(0.2, 0.8))


def _quiet_noise(exponent: float, samples: int, rng: np.random.Generator) -> Audio:
    """Noise below full scale."""
    return scaled(noise(exponent, samples, rng), rng.uniform(0.05, 0.5))
