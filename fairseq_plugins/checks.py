"""Checks of manifests, labels and audio that run before the first update. Each failure is one `UserError`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile
from fairseq.data import Dictionary

from hubert_eff.config import FRAME_STRIDE, SAMPLE_RATE
from hubert_eff.errors import UserError

logger = logging.getLogger(__name__)

TOLERANCE = 0.1  # seconds by which labels and audio may differ: fairseq's own limit
MAX_FILES = 20_000  # audio files whose presence is checked, evenly spread over a larger manifest
MAX_HEADERS = 20  # audio files whose header is read, evenly spread
FRAME_RATE = SAMPLE_RATE // FRAME_STRIDE


@dataclass
class Manifest:
    """A fairseq manifest: a root directory, then a path under it and a number of samples per utterance."""

    path: Path
    root: Path
    names: list[str]
    samples: list[int]

    @property
    def seconds(self) -> float:
        """Length of all audio."""
        return sum(self.samples) / SAMPLE_RATE


def read_manifest(path: Path) -> Manifest:
    """Read `SPLIT.tsv`; `UserError` if it is missing, empty or malformed."""
    if not path.is_file():
        raise UserError(f"no manifest {path}: make one with `hubert-eff manifest`, and point task.data to its directory")
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) < 2:
        raise UserError(f"{path} lists no utterance: its first line is the root directory, each further line a path and its samples")
    names, samples = [], []
    for number, line in enumerate(lines[1:], start=2):
        name, _, length = line.partition("\t")
        if not name or not length.isdigit():
            raise UserError(f"{path} line {number}: expected a path, a tab and a number of samples, found {line[:80]!r}")
        names.append(name)
        samples.append(int(length))
    return Manifest(path, Path(lines[0].strip()), names, samples)


def read_dictionary(path: Path) -> Dictionary:
    """Read `dict.NAME.txt`; `UserError` if it is missing or malformed."""
    if not path.is_file():
        raise UserError(f"no dictionary {path}: make it with `hubert-eff labels`, and point task.label_dir to its directory")
    try:
        return Dictionary.load(str(path))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path} is no fairseq dictionary ('<class> <count>' per line): {' '.join(str(error).split())}") from error


def _spread(total: int, limit: int) -> list[int]:
    """At most `limit` of the indices below `total`, evenly spread, the first included."""
    return sorted({i * total // limit for i in range(limit)}) if total > limit else list(range(total))


def check_audio(manifest: Manifest, sample_rate: int, skip: bool = False) -> None:
    """Every file (at most `MAX_FILES`, evenly spread) exists; a few have the sample rate and length that the manifest implies.

    With `skip`, as task.bad_audio=skip, only a wrong sample rate, or that all files are missing, is an error: training names the others.
    """
    chosen = _spread(len(manifest.names), MAX_FILES)
    missing = [i for i in chosen if not os.path.exists(manifest.root / manifest.names[i].split(".zip:")[0]) and not _in_zip(manifest, i)]
    if len(missing) > (len(chosen) - 1 if skip else 0):
        raise UserError(
            f"{manifest.path}: {len(missing)} of {len(chosen)} audio files are missing under {manifest.root}, first "
            f"{manifest.names[missing[0]]}: correct the root in the first line, or make the manifest again"
        )
    for i in (i for i in _spread(len(manifest.names), MAX_HEADERS) if not _in_zip(manifest, i)):
        file = manifest.root / manifest.names[i]
        try:
            info = soundfile.info(str(file))
        except soundfile.SoundFileError as error:
            if skip:
                continue
            raise UserError(f"{file} cannot be read as audio ({error}): make the manifest again") from error
        if info.samplerate != sample_rate:
            raise UserError(
                f"{file} has {info.samplerate} Hz, not task.sample_rate={sample_rate}: make the manifest with `hubert-eff manifest`"
            )
        if info.frames != manifest.samples[i] and not skip:
            raise UserError(
                f"{file} has {info.frames} samples, not {manifest.samples[i]} as {manifest.path} says: make the manifest again"
            )
    logger.info(f"{manifest.path}: {manifest.seconds / 3600:.2f} h; {len(chosen)} of {len(manifest.names)} audio files looked up")


def _in_zip(manifest: Manifest, index: int) -> bool:
    """Whether an entry is a slice of an uncompressed archive, fairseq's ARCHIVE.zip:OFFSET:LENGTH."""
    archive, found, _ = manifest.names[index].partition(".zip:")
    return bool(found) and (manifest.root / f"{archive}.zip").is_file()


def check_rate_record(label_dir: Path, label_rate: float) -> None:
    """The rate agrees with `labels.json`, where `hubert-eff labels` recorded how the labels were made."""
    record = label_dir / "labels.json"
    if not record.is_file():
        return
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{record} is no JSON ({error}): make the labels again, or remove it") from error
    rate = content.get("rate") if isinstance(content, dict) else None
    if rate is not None and float(rate) != label_rate:
        raise UserError(
            f"task.label_rate={label_rate:g}, but {record} says the labels were made at {rate:g} per second from "
            f"{content.get('source', 'an unnamed source')}: set task.label_rate={rate:g}"
        )


def check_labels(manifest: Manifest, path: Path, label_rate: float, dictionary: Dictionary, dictionary_path: Path) -> None:
    """One line per utterance, as long as the audio at `label_rate`, and every class in the dictionary."""
    if not path.is_file():
        raise UserError(f"no labels {path}: make them with `hubert-eff labels`, and point task.label_dir to their directory")
    known = set(dictionary.symbols[dictionary.nspecial :])
    lengths = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            classes = line.split()
            lengths.append(len(classes))
            foreign = set(classes) - known
            if foreign:
                raise UserError(
                    f"{path} line {number}: class {min(foreign)} is not among the {len(known)} of {dictionary_path}: the two belong to "
                    "different k-means models, make both with one `hubert-eff labels`"
                )
    if len(lengths) != len(manifest.names):
        raise UserError(
            f"{path} has {len(lengths)} lines for the {len(manifest.names)} utterances of {manifest.path}: make the labels again"
        )
    estimate = FRAME_RATE * round(sum(lengths) / manifest.seconds / FRAME_RATE)
    if estimate > 0 and estimate != label_rate:
        raise UserError(
            f"task.label_rate={label_rate:g}, but {path} has {sum(lengths)} labels for {manifest.seconds:.1f} s of audio, about {estimate} "
            f"per second: set task.label_rate={estimate} (MFCC labels have 100, labels from a model's layer 50)"
        )
    for number, (length, samples) in enumerate(zip(lengths, manifest.samples), start=1):
        if abs(length / label_rate - samples / SAMPLE_RATE) > TOLERANCE:
            raise UserError(
                f"{path} line {number}: {length} labels ({length / label_rate:.2f} s at task.label_rate={label_rate:g}) for "
                f"{samples / SAMPLE_RATE:.2f} s of audio ({manifest.names[number - 1]}): the labels are another manifest's, make them again"
            )


def check_lengths(manifest: Manifest, shortest: int | None, longest: int | None) -> None:
    """At least one utterance passes the limits on length."""
    if not any((shortest or 0) <= n <= (longest or n) for n in manifest.samples):
        raise UserError(
            f"{manifest.path}: none of its {len(manifest.samples)} utterances ({min(manifest.samples)} to {max(manifest.samples)} samples) "
            f"lies between task.min_sample_size={shortest} and task.max_keep_size={longest}: change these, or join recordings "
            "(`hubert-eff manifest --join SECONDS`)"
        )


def check_split(
    data: Path,
    label_dir: Path,
    split: str,
    labels: Sequence[str],
    label_rate: float,
    sample_rate: int,
    dictionaries: Sequence[Dictionary],
    shortest: int | None,
    longest: int | None,
    skip: bool,
) -> None:
    """All checks of one split. Raises `UserError` for the first that fails."""
    manifest = read_manifest(data / f"{split}.tsv")
    check_lengths(manifest, shortest, longest)
    check_rate_record(label_dir, label_rate)
    for name, dictionary in zip(labels, dictionaries):
        check_labels(manifest, label_dir / f"{split}.{name}", label_rate, dictionary, label_dir / f"dict.{name}.txt")
    check_audio(manifest, sample_rate, skip)
