"""Makes fairseq manifests of 16 kHz mono audio from a folder of recordings or from a lhotse or Kaldi manifest.

A recording that is 16 kHz mono already (wav, flac or ogg) is used in place. Every other recording, and every segment of a longer one, is
converted once to FLAC in a cache, under a name that depends on its path, size and time of change, so that the next run finds it. It has
16 bits, or 24 if 16 would lose quiet sounds.

    OUT/train.tsv, OUT/valid.tsv   (OUT/test.tsv with test speakers) root folder, then `path <tab> samples` per utterance
    OUT/parts.tsv                  parts of each utterance: utterance, start s, end s, source, transcript, and the second of the source
                                   at which the part begins (with a header)
    OUT/left_out.tsv               source, reason (with a header)
    OUT/manifest.json              options and counts

The root folder is the closest folder that holds all utterances. fairseq's loader crashes on an empty split, so valid.tsv repeats a single
utterance, and the summary says so.
"""

from __future__ import annotations

import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import SAMPLE_RATE
from ..errors import UserError, unknown
from ..utils.files import write_json, write_text
from .checking import Recording, check_all, digest, nothing_usable, plain, plain_line
from .convert import Utterance, convert
from .lhotse_kaldi import read_import
from .sources import Listing, list_folder

MIN_FRAME_SECONDS = 0.025  # one label frame: the window of MFCC and the receptive field of the extractor
MIN_FOLDERS = 3  # from this number on, valid consists of whole folders
SPLITS = ("auto", "folder", "file")


@dataclass(frozen=True)
class Options:
    """Options of `make_manifest`.

    Args:
        valid_percent: wanted share of the audio in valid; 0 writes no valid.tsv.
        split_by: "folder" (valid is whole folders: unseen speakers), "file", or "auto": folder from three folders on.
        folder_level: level of the folder below DIR that names the speaker; 1 is the first.
        speaker_pattern: regular expression to find in the path of a recording below DIR; its first group, or else the whole match, is the
            speaker instead of a folder. Recordings in which it is not found are left out.
        join: target length in seconds of utterances joined from the recordings of one folder; None leaves recordings alone.
        min_seconds, max_seconds: shorter or longer recordings are left out.
        seed: seed of the split and of the order in which recordings are joined.
        workers: number of threads that decode and convert.
        valid_speakers, test_speakers: speakers (folders, or speakers of a manifest) that make up the valid and the test split. Without
            valid speakers, valid is drawn from those that are left; without test speakers there is no test split.
    """

    valid_percent: float = 5.0
    split_by: str = "auto"
    folder_level: int = 1
    speaker_pattern: str | None = None
    join: float | None = None
    min_seconds: float = 0.1
    max_seconds: float | None = None
    seed: int = 1
    workers: int = 4
    valid_speakers: tuple[str, ...] = ()
    test_speakers: tuple[str, ...] = ()

    @property
    def named(self) -> tuple[str, ...]:
        """All named speakers."""
        return (*self.valid_speakers, *self.test_speakers)

    def validate(self) -> None:
        """Raise `UserError` for an invalid value."""
        if not 0 <= self.valid_percent < 100:
            raise UserError(f"--valid-percent {self.valid_percent:g} must be at least 0 and below 100")
        if self.split_by not in SPLITS:
            raise unknown("value of --split-by", self.split_by, SPLITS)
        if self.min_seconds < MIN_FRAME_SECONDS:
            raise UserError(f"--min-seconds {self.min_seconds:g} is shorter than one label frame, {MIN_FRAME_SECONDS} s")
        if self.max_seconds is not None and self.max_seconds < self.min_seconds:
            raise UserError(f"--max-seconds {self.max_seconds:g} is below --min-seconds {self.min_seconds:g}")
        if self.join is not None and not self.min_seconds <= self.join <= 3600:
            raise UserError(f"--join {self.join:g} must be --min-seconds to 3600 seconds")
        if self.folder_level < 1 or self.workers < 1:
            raise UserError("--folder-level and --workers must be at least 1")
        if self.speaker_pattern is not None and self.folder_level != 1:
            raise UserError("--speaker-pattern and --folder-level both say where the speaker's name is: give one of them")
        twice = [name for name, count in Counter(self.named).items() if count > 1]
        if twice:
            raise UserError(f"the speaker '{twice[0]}' is named twice in --valid-speakers and --test-speakers: a speaker is in one split")
        if self.named and self.split_by == "file":
            raise UserError("--split-by file does not go with named speakers: leave it out")


def make_manifest(source: str | Path, out: str | Path, cache: str | Path | None = None, options: Options | None = None) -> dict[str, Any]:
    """Check every recording of `source`, convert those that need it, and write the manifests to `out`.

    Args:
        source: folder of recordings, searched with its sub-folders except hidden ones; or a lhotse manifest, a folder of these, or a
            Kaldi data folder.
        out: folder for the manifests.
        cache: folder for converted and joined audio (default: `out`/audio).
        options: see `Options`.

    Returns:
        The summary, which is also the content of manifest.json.

    Raises:
        UserError: no recording is usable, options are invalid, a manifest is malformed or asks for something unsupported, or the source
            cannot be split as asked. Nothing is then written to `out`.
    """
    options = options or Options()
    options.validate()
    place, target = Path(os.path.abspath(source)), Path(os.path.abspath(out))
    store = Path(os.path.abspath(cache)) if cache else target / "audio"
    for path in (target, store):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: name a folder")
    if place.is_dir() and not os.access(place, os.R_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UserError(f"the folder {place} cannot be read")

    listing = read_import(place)
    if listing is not None and options.speaker_pattern is not None:
        raise UserError(f"--speaker-pattern is for folders of recordings; {place} ({listing.layout}) names the speakers itself")
    listing = listing or list_folder(place, {target, store}, options.folder_level, options.speaker_pattern)
    _check_speakers(listing, options)
    root, speakers = listing.root, _speakers_needed(options)
    recordings, left_out = check_all(listing, store, options.min_seconds, options.max_seconds, speakers, options.workers)
    while True:
        by_folder = _splits_by_folder(recordings, options, root)
        utterances = _join(recordings, store, options) if options.join else _alone(recordings, root, store)
        top = Path(os.path.commonpath({os.path.dirname(u.path) for u in utterances}))
        if not plain(str(top)):
            raise UserError(f"the folder {str(top)!r} cannot stand in a TSV: rename it, or name another --cache")
        lost = convert(utterances, root, store, options.workers)
        if not lost:
            break
        left_out = sorted([*left_out, *((recording.item.name, reason) for recording, reason in lost)])
        dropped = {id(recording) for recording, _ in lost}
        recordings = [r for r in recordings if id(r) not in dropped]
        if not recordings:
            raise nothing_usable(listing, left_out)
    rest, test, _ = _take(utterances, options.test_speakers)
    train, valid, held_out = _take(rest, options.valid_speakers) if options.valid_speakers else _split(rest, by_folder, options)
    for split, found, named in (("train", train, True), ("valid", valid, options.valid_speakers), ("test", test, options.test_speakers)):
        if named and not found:
            raise UserError(f"no usable recording is left for {split}.tsv: {root} has too few, or none of its speakers")

    repeated = options.valid_percent > 0 and not valid
    splits = {"train": train, "valid": train if repeated else valid, "test": test}
    above = len(os.path.join(top, ""))  # length of the root in a path
    target.mkdir(parents=True, exist_ok=True)
    rows = [r for u in utterances for r in _part_rows(u, above, listing)]
    for name, lines in splits.items():
        if lines:
            entries = [f"{u.path[above:]}\t{u.samples}\n" for u in lines]
            write_text(target / f"{name}.tsv", f"{top}\n" + "".join(entries))
        else:
            (target / f"{name}.tsv").unlink(missing_ok=True)
    write_text(target / "parts.tsv", "utterance\tstart\tend\tsource\ttranscript\tsource_start\n" + "".join(rows))
    write_text(target / "left_out.tsv", "source\treason\n" + "".join(f"{plain_line(p)}\t{plain_line(r)}\n" for p, r in left_out))
    summary = {
        "source": plain_line(str(root)),
        "layout": listing.layout,
        "root": str(top),
        "options": asdict(options),
        "recordings": len(recordings),
        "left_out": len(left_out),
        "left_out_reasons": dict(Counter(r.split(":")[0] for _, r in left_out).most_common()),
        "converted": sum(len(u.parts) for u in utterances if u.bits) if not options.join else sum(not r.direct for r in recordings),
        "transcribed": sum(bool(row.rstrip("\n").split("\t")[4]) for row in rows),
        "split_by": "folder" if by_folder else "file",
        "valid_folders": [plain_line(name) for name in held_out],
        "test_folders": [plain_line(name) for name in sorted(options.test_speakers)],
        "valid_repeats_train": repeated,
        "splits": {n: {"utterances": len(s), "minutes": round(_minutes(s), 3)} for n, s in splits.items() if s},
    }
    write_json(target / "manifest.json", summary)
    return summary


# ---- utterances


def _alone(recordings: list[Recording], root: Path, store: Path) -> list[Utterance]:
    utterances: list[Utterance] = []
    taken: set[str] = set()  # a manifest may list a file twice, but paths must be unique in a TSV
    for recording in recordings:
        path = os.path.join(root, recording.item.path)
        if recording.direct and path not in taken and plain(path):
            taken.add(path)
            utterances.append(Utterance(path, (recording,)))
        else:
            stem = _safe(os.path.splitext(os.path.basename(recording.item.name))[0], 100)
            utterances.append(_copy(store, recording.item.group, f"{stem}-{recording.key}", (recording,)))
    return utterances


def _copy(store: Path, group: str, name: str, parts: tuple[Recording, ...]) -> Utterance:
    """An utterance of the cache."""
    bits = max(p.checked.bits for p in parts)
    folder = "/".join(_safe(part, 200) for part in group.split("/") if part)
    if len(os.fsencode(folder)) > 1000:
        folder = digest(group)
    return Utterance(os.path.join(store, folder, f"{name}{'-24' if bits > 16 else ''}.flac"), parts, bits)


def _join(recordings: list[Recording], store: Path, options: Options) -> list[Utterance]:
    """Join shuffled recordings of one folder or speaker, as close to the target length as the next recording allows.

    A rest at the end of a folder joins its last utterance if it is shorter than half the target.
    """
    assert options.join is not None
    target = options.join * SAMPLE_RATE
    folders: dict[str, list[Recording]] = defaultdict(list)
    for recording in recordings:
        folders[recording.item.group].append(recording)
    utterances: list[Utterance] = []
    for folder, members in sorted(folders.items()):
        random.Random(f"join {options.seed} {plain_line(folder) or '.'}").shuffle(members)
        chains: list[list[Recording]] = [[]]
        length = 0
        for member in members:
            if length and abs(length + member.samples - target) > abs(length - target):
                chains.append([])
                length = 0
            chains[-1].append(member)
            length += member.samples
        if len(chains) > 1 and length < target / 2:
            chains[-2:] = [chains[-2] + chains[-1]]
        for number, chain in enumerate(chains, start=1):
            key = digest("\n".join(r.key for r in chain))
            utterances.append(_copy(store, folder, f"joined-{number:05d}-{key}", tuple(chain)))
    return utterances


# ---- splits


def _check_speakers(listing: Listing, options: Options) -> None:
    """Raise `UserError`, with the nearest name, for a named speaker that the source does not have."""
    known = {item.speaker for item in listing.items}
    if options.named and listing.layout == "folder" and not known - {""}:
        raise UserError(
            f"no speaker is known in {listing.root}: its recordings are not in folders of speakers. If their names hold the speaker, say "
            "where with --speaker-pattern, such as '_([a-z]+)_' for 7_theo_0.wav"
        )
    for name in options.named:
        if name not in known:
            raise unknown(f"speaker in {listing.root}", name, known)
    if options.named and known <= set(options.named):
        raise UserError(f"--valid-speakers and --test-speakers name all speakers of {listing.root}: none is left for train.tsv")


def _take(utterances: list[Utterance], speakers: Iterable[str]) -> tuple[list[Utterance], list[Utterance], list[str]]:
    """Separate (utterances of others, utterances of these speakers, these speakers)."""
    names = set(speakers)
    others: list[Utterance] = []
    taken: list[Utterance] = []
    for utterance in utterances:
        (taken if utterance.parts[0].item.speaker in names else others).append(utterance)
    return others, taken, sorted(names)


def _speakers_needed(options: Options) -> int:
    """The number of speakers with usable recordings that the requested split needs."""
    if options.named:
        return len(options.named) + 1
    return 2 if options.split_by == "folder" and options.valid_percent > 0 else 1


def _splits_by_folder(recordings: Iterable[Recording], options: Options, root: Path) -> bool:
    count = len({r.item.speaker for r in recordings})
    if options.named:
        return True
    if count < _speakers_needed(options):
        raise UserError(
            f"--split-by folder needs two folders (or speakers of a manifest) with usable recordings, {root} has {count}: "
            "use --split-by file"
        )
    return options.split_by == "folder" or (options.split_by == "auto" and count >= MIN_FOLDERS)


def _split(utterances: list[Utterance], by_folder: bool, options: Options) -> tuple[list[Utterance], list[Utterance], list[str]]:
    """(train, valid, folders held out). Random groups join valid while that brings it closer to the wanted share."""
    groups: dict[str, list[Utterance]] = defaultdict(list)
    for number, utterance in enumerate(utterances):
        groups[utterance.parts[0].item.speaker if by_folder else str(number)].append(utterance)
    if options.valid_percent == 0 or len(groups) < 2:
        return utterances, [], []
    sizes = {name: sum(u.samples for u in members) for name, members in groups.items()}
    order = sorted(groups)
    random.Random(f"split {options.seed}").shuffle(order)
    wanted = options.valid_percent / 100 * sum(sizes.values())
    chosen: list[str] = []
    held = 0
    for name in order:
        if len(chosen) < len(order) - 1 and abs(held + sizes[name] - wanted) < abs(held - wanted):
            chosen.append(name)
            held += sizes[name]
    if not chosen:  # every group is more than twice the wanted share
        chosen = [min(order, key=lambda n: sizes[n])]
    taken = {id(u) for name in chosen for u in groups[name]}
    train = [u for u in utterances if id(u) not in taken]
    return train, [u for u in utterances if id(u) in taken], sorted(chosen) if by_folder else []


# ---- writing


def _part_rows(utterance: Utterance, above: int, listing: Listing) -> Iterator[str]:
    name = utterance.path[above:]
    start = 0
    for part in utterance.parts:
        end = start + part.samples
        source, text, begins = plain_line(part.item.path), listing.transcript(part.item), part.first / part.checked.rate
        yield f"{name}\t{start / SAMPLE_RATE:.6f}\t{end / SAMPLE_RATE:.6f}\t{source}\t{text}\t{begins:.6f}\n"
        start = end


def _minutes(utterances: list[Utterance]) -> float:
    return math.fsum(u.samples for u in utterances) / SAMPLE_RATE / 60


def _safe(name: str, most: int) -> str:
    """A safe file name of at most so many bytes: word characters, dots and dashes."""
    text = re.sub(r"[^\w.-]|^\.\.?$", "_", name)
    return os.fsencode(text)[:most].decode("utf-8", "ignore")
