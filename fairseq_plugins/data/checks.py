"""Checks manifests, labels and audio before the first update. Each failure is one `UserError`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import soundfile
from fairseq.data import Dictionary

from hubert_eff.config import FRAME_STRIDE, RECEPTIVE_FIELD, SAMPLE_RATE
from hubert_eff.data.tsv import Manifest, read_manifest, spread
from hubert_eff.errors import UserError
from hubert_eff.labels import classes
from hubert_eff.labels.classes import Labels
from hubert_eff.labels.record import Record, read_record

logger = logging.getLogger(__name__)

TOLERANCE = 0.1  # seconds by which labels and audio may differ: fairseq's own limit
MAX_FILES = 20_000  # audio files whose presence is checked, evenly spread over a larger manifest
MAX_HEADERS = 20  # audio files whose header is read, evenly spread
RECORDED = "km"  # the labels that labels.json describes
FRAME_RATE = SAMPLE_RATE // FRAME_STRIDE
TELLING = SAMPLE_RATE // 5  # samples of an utterance whose number of labels tells their rate: 0.2 s


def read_dictionary(path: Path) -> Dictionary:
    """Read `dict.NAME.txt`. Raises `UserError` if it is missing or malformed."""
    dictionary = Dictionary()
    for name, count in classes.read_dictionary(path):
        if name in dictionary:
            raise UserError(f"{path} is not a fairseq dictionary: {name!r} is one of fairseq's own symbols")
        dictionary.add_symbol(name, n=count)
    return dictionary


def check_audio(manifest: Manifest, sample_rate: int, skip: bool = False) -> None:
    """Every file (at most `MAX_FILES`, evenly spread) exists; a few have the sample rate and length that the manifest implies.

    With `skip` (task.bad_audio=skip) only a wrong sample rate, or the loss of all files, is an error; training names the other faults.
    """
    chosen = spread(len(manifest.names), MAX_FILES)
    missing = [i for i in chosen if not os.path.exists(manifest.root / manifest.names[i].split(".zip:")[0]) and not _in_zip(manifest, i)]
    if len(missing) > (len(chosen) - 1 if skip else 0):
        raise UserError(
            f"{manifest.path}: {len(missing)} of {len(chosen)} audio files are missing under {manifest.root}, first "
            f"{manifest.names[missing[0]]}: correct the root in the first line, or make the manifest again"
        )
    for i in (i for i in spread(len(manifest.names), MAX_HEADERS) if not _in_zip(manifest, i)):
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
            raise UserError(f"{file} has {info.frames} samples, not {manifest.samples[i]} as {manifest.path} says: make the manifest again")
    logger.info(f"{manifest.path}: {manifest.seconds / 3600:.2f} h; {len(chosen)} of {len(manifest.names)} audio files looked up")


def _in_zip(manifest: Manifest, index: int) -> bool:
    """Whether an entry is a slice of an uncompressed archive, fairseq's ARCHIVE.zip:OFFSET:LENGTH."""
    archive, found, _ = manifest.names[index].partition(".zip:")
    return bool(found) and (manifest.root / f"{archive}.zip").is_file()


def check_rate(record: Record, label_rate: float) -> None:
    """Check the rate against `labels.json`, in which `hubert-eff labels` recorded how the labels were made."""
    if record.rate not in (None, label_rate):
        raise UserError(
            f"task.label_rate={label_rate:g}, but {record.file} says the labels were made at {record.rate:g} per second from "
            f"{record.source}: set task.label_rate={record.rate:g}"
        )


def check_labels(manifest: Manifest, path: Path, label_rate: float, dictionary: Dictionary, dictionary_path: Path) -> Labels:
    """Check for one line per utterance, as long as the audio at `label_rate`, with known classes. Returns the checked labels."""
    labels = classes.read_labels(path, dictionary.symbols[dictionary.nspecial :], str(dictionary_path))
    if len(labels) != len(manifest.entries):
        raise UserError(
            f"{path} has {len(labels)} lines for the {len(manifest.entries)} utterances of {manifest.path}: make the labels again"
        )
    count = int(labels.counts.sum())
    estimate = estimated_rate(labels.counts.tolist(), manifest.samples)
    if estimate > 0 and estimate != label_rate:
        raise UserError(
            f"task.label_rate={label_rate:g}, but {path} has {count} labels for {manifest.seconds:.1f} s of audio, about {estimate} "
            f"per second: set task.label_rate={estimate} (MFCC labels have 100, labels from a model's layer 50)"
        )
    for number, (length, (name, samples)) in enumerate(zip(labels.counts.tolist(), manifest.entries), start=1):
        if abs(length / label_rate - samples / SAMPLE_RATE) > TOLERANCE:
            raise UserError(
                f"{path} line {number}: {length} labels ({length / label_rate:.2f} s at task.label_rate={label_rate:g}) for "
                f"{samples / SAMPLE_RATE:.2f} s of audio ({name}): the labels belong to another manifest, make them again"
            )
    return labels


def estimated_rate(labels: Sequence[int], samples: Sequence[int]) -> int:
    """Estimate labels per second, a multiple of 50, from the labels and samples of utterances; 0 if all are too short to tell.

    The first label of an utterance comes with 25 ms of audio, whatever the rate, and the others in steps of it.
    """
    long = [(n - 1, size - RECEPTIVE_FIELD) for n, size in zip(labels, samples) if size >= TELLING]
    seconds = sum(size for _, size in long) / SAMPLE_RATE
    return FRAME_RATE * round(sum(n for n, _ in long) / seconds / FRAME_RATE) if seconds else 0


def check_lengths(manifest: Manifest, shortest: int | None, longest: int | None) -> None:
    """Check that at least one utterance passes the limits on length."""
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
) -> tuple[Manifest, list[Labels]]:
    """Run all checks of one split; returns the checked files. Raises `UserError` for the first fault."""
    manifest, record = read_manifest(data / f"{split}.tsv"), read_record(label_dir)
    check_lengths(manifest, shortest, longest)
    if record is not None:
        check_rate(record, label_rate)
    found = [
        check_labels(manifest, label_dir / f"{split}.{name}", label_rate, dictionary, label_dir / f"dict.{name}.txt")
        for name, dictionary in zip(labels, dictionaries)
    ]
    check_audio(manifest, sample_rate, skip)
    if record is not None and RECORDED in labels:  # labels under other names come from other programs
        at = list(labels).index(RECORDED)
        record.check_manifest(manifest)
        record.check_labels(split, found[at], len(dictionaries[at]) - dictionaries[at].nspecial)
    return manifest, found
