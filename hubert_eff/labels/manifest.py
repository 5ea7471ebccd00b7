"""From a folder of recordings to fairseq manifests of 16 kHz mono audio.

A recording that is 16 kHz mono already (wav, flac or ogg) is used where it lies; every other one is converted once to 16-bit FLAC in a
cache, under a name that depends on its path, size and time of change, so that the next run finds it.

    OUT/train.tsv, OUT/valid.tsv   root folder, then `path <tab> samples` per utterance
    OUT/parts.tsv                  what each utterance is made of: utterance, start s, end s, source, transcript (with a header)
    OUT/left_out.tsv               source, reason (with a header)
    OUT/manifest.json              options and counts

The root folder is the closest folder that holds all utterances. A split is empty in fairseq's loader only at the price of a crash, so
with one single utterance valid.tsv repeats it, and the summary says so.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from ..config import SAMPLE_RATE
from ..errors import UserError, unknown
from ..files import write_json, write_text
from ..progress import progress
from .audio import DIRECT_SUFFIXES, FOREIGN_SUFFIXES, SUFFIXES, Array, Checked, Unusable, check, read_mono, write_flac
from .transcripts import Transcripts

MIN_FRAME_SECONDS = 0.025  # one label frame: the window of MFCC, and the receptive field of the extractor
MIN_FOLDERS = 3  # from here on valid is whole folders
SPLITS = ("auto", "folder", "file")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Options:
    """What `make_manifest` may be told.

    Args:
        valid_percent: wanted share of the audio in valid; 0 writes no valid.tsv.
        split_by: "folder" (valid is whole folders: unseen speakers), "file", or "auto": folder from three folders on.
        folder_level: which folder below DIR names the speaker; 1 is the first.
        join: target length in seconds of utterances joined from the recordings of one folder; None leaves recordings alone.
        min_seconds, max_seconds: shorter or longer recordings are left out.
        seed: seed of the split and of the order in which recordings are joined.
        workers: threads that decode and convert.
    """

    valid_percent: float = 5.0
    split_by: str = "auto"
    folder_level: int = 1
    join: float | None = None
    min_seconds: float = 0.1
    max_seconds: float | None = None
    seed: int = 1
    workers: int = 4

    def validate(self) -> None:
        """Raise `UserError` for a value out of range."""
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


@dataclass(frozen=True)
class Recording:
    """A usable file of the input folder: its relative path, the key of its content, and what its decoding found."""

    relative: str
    key: str
    checked: Checked

    @property
    def direct(self) -> bool:
        """Can be used where it lies: 16 kHz mono, of a format and a name that fairseq can read from a TSV."""
        suffix = Path(self.relative).suffix
        return (self.checked.rate, self.checked.channels) == (SAMPLE_RATE, 1) and (
            suffix in DIRECT_SUFFIXES and _plain(self.relative)
        )


@dataclass(frozen=True)
class Utterance:
    """A line of a manifest: a 16 kHz mono file, and the recordings it is made of, in order."""

    path: Path
    parts: tuple[Recording, ...]

    @property
    def samples(self) -> int:
        """Length at 16 kHz."""
        return sum(p.checked.samples for p in self.parts)


def make_manifest(
    source: str | Path, out: str | Path, cache: str | Path | None = None, options: Options | None = None
) -> dict[str, Any]:
    """Check every recording under `source`, convert what needs it, and write the manifests to `out`.

    Args:
        source: folder of recordings, searched with its sub-folders; hidden files and folders are passed over.
        out: folder for the manifests.
        cache: folder for converted and joined audio (default: `out`/audio).
        options: see `Options`.

    Returns:
        The summary, which is also the content of manifest.json.

    Raises:
        UserError: no usable recording, bad options, a folder that cannot be split as asked. Nothing is written to `out` then.
    """
    options = options or Options()
    options.validate()
    root, target = Path(os.path.abspath(source)), Path(os.path.abspath(out))
    store = Path(os.path.abspath(cache)) if cache else target / "audio"
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: name a folder of wav, flac or ogg files")
    for path in (target, store):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: name a folder")

    recordings, left_out = _check_all(root, store, {target, store}, options)
    by_folder = _splits_by_folder(recordings, options, root)
    utterances = _join(recordings, store, options) if options.join else [_alone(r, root, store) for r in recordings]
    top = Path(os.path.commonpath([u.path.parent for u in utterances]))
    if not _plain(str(top)):
        raise UserError(f"the folder {str(top)!r} cannot stand in a TSV: rename it, or name another --cache")
    _convert(utterances, root, options.workers)
    train, valid, held_out = _split(utterances, by_folder, options)

    repeated = options.valid_percent > 0 and not valid
    splits = {"train": train, "valid": train if repeated else valid}
    target.mkdir(parents=True, exist_ok=True)
    transcripts = Transcripts(root)
    rows = [r for u in utterances for r in _part_rows(u, top, transcripts)]
    for name, lines in splits.items():
        if lines:
            entries = [f"{u.path.relative_to(top)}\t{u.samples}\n" for u in lines]
            write_text(target / f"{name}.tsv", f"{top}\n" + "".join(entries))
        else:
            (target / f"{name}.tsv").unlink(missing_ok=True)
    write_text(target / "parts.tsv", "utterance\tstart\tend\tsource\ttranscript\n" + "".join(rows))
    write_text(target / "left_out.tsv", "source\treason\n" + "".join(f"{_line(p)}\t{r}\n" for p, r in left_out))
    summary = {
        "source": str(root),
        "root": str(top),
        "options": asdict(options),
        "recordings": len(recordings),
        "left_out": len(left_out),
        "left_out_reasons": dict(Counter(r.split(":")[0] for _, r in left_out).most_common()),
        "converted": sum(not r.direct for r in recordings),
        "transcribed": sum(bool(row.rstrip("\n").split("\t")[4]) for row in rows),
        "split_by": "folder" if by_folder else "file",
        "valid_folders": held_out,
        "valid_repeats_train": repeated,
        "splits": {n: {"utterances": len(s), "minutes": round(_minutes(s), 3)} for n, s in splits.items() if s},
    }
    write_json(target / "manifest.json", summary)
    return summary


# ---- which files, and are they sound


def _check_all(
    root: Path, store: Path, skip: set[Path], options: Options
) -> tuple[list[Recording], list[tuple[str, str]]]:
    names, foreign = _scan(root, skip)
    if not names and not foreign:
        raise UserError(f"no recording in {root}: it must hold {', '.join(sorted(SUFFIXES))} files, in it or its sub-folders")
    index = _Index(store / "checked.jsonl")

    def one(name: str) -> Recording | str:
        try:
            path = root / name
            key = _key(path)
            checked = index.get(key)
            if checked is None:
                checked = check(path)
                index.add(key, checked)
            seconds = checked.samples / SAMPLE_RATE
            if seconds < options.min_seconds:
                return f"too short: {seconds:.3f} s is below --min-seconds {options.min_seconds:g}"
            if options.max_seconds is not None and seconds > options.max_seconds:
                return f"too long: {seconds:.1f} s is above --max-seconds {options.max_seconds:g}"
            return Recording(name, key, checked)
        except Unusable as reason:
            return str(reason)
        except OSError as error:
            return f"not readable ({error.strerror})"

    results: list[Recording | str] = []
    folders: set[str] = set()
    for result in _parallel(one, names, options.workers, "checking recordings"):
        results.append(result)
        if isinstance(result, Recording):
            folders.add(_speaker(result, options.folder_level))
            if len(folders) >= _folders_needed(options):
                index.keep()
    recordings = [r for r in results if isinstance(r, Recording)]
    left_out = [(n, r) for n, r in zip(names, results) if isinstance(r, str)]
    left_out += [(n, f"format {Path(n).suffix} is not read: convert it to wav or flac") for n in foreign]
    left_out.sort()
    if not recordings:
        name, reason = left_out[0]
        more = f", and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        raise UserError(f"no usable recording in {root}: {_line(name)} ({reason}){more}")
    return recordings, left_out


def _scan(root: Path, skip: set[Path]) -> tuple[list[str], list[str]]:
    """Relative paths of audio files, and of files that are audio in a format not read. Follows links, each folder once."""
    names: list[str] = []
    foreign: list[str] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and Path(folder, f) not in skip)
        for file in files:
            suffix = Path(file).suffix.lower()
            if not file.startswith(".") and suffix in SUFFIXES | FOREIGN_SUFFIXES:
                (names if suffix in SUFFIXES else foreign).append(os.path.relpath(os.path.join(folder, file), root))
    return sorted(names), sorted(foreign)


class _Index:
    """What earlier runs found out about files, one JSON line each; appended as the work goes on, so that a restart reuses it.

    Lines wait in memory until `keep` says that the recordings make a manifest: a run that must fail leaves nothing behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = Lock()
        self.waiting: list[str] = []
        self.kept = False
        self.known: dict[str, Checked] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    key, *fields = json.loads(line)
                    self.known[key] = Checked(*fields)
                except (ValueError, TypeError):  # a line cut off by a crash
                    continue

    def get(self, key: str) -> Checked | None:
        return self.known.get(key)

    def add(self, key: str, checked: Checked) -> None:
        with self.lock:
            self.waiting.append(json.dumps([key, checked.rate, checked.channels, checked.frames, checked.peak]))
            if self.kept:
                self._write()

    def keep(self) -> None:
        """Write what waits, and from now on each line at once."""
        with self.lock:
            self.kept = True
            self._write()

    def _write(self) -> None:
        if self.waiting:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(f"\n{line}\n" for line in self.waiting))
            self.waiting.clear()


def _key(path: Path) -> str:
    state = path.stat()
    return _digest(f"{path}\n{state.st_size}\n{state.st_mtime_ns}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


# ---- utterances


def _alone(recording: Recording, root: Path, store: Path) -> Utterance:
    if recording.direct:
        return Utterance(root / recording.relative, (recording,))
    folder, stem = _safe(Path(recording.relative).parent), _safe(Path(recording.relative).stem)
    return Utterance(store / folder / f"{stem}-{recording.key}.flac", (recording,))


def _join(recordings: list[Recording], store: Path, options: Options) -> list[Utterance]:
    """Chains of shuffled recordings of one folder, each as close to the target length as the next recording allows.

    What remains at the end of a folder goes to its last utterance if it is shorter than half the target.
    """
    assert options.join is not None
    target = options.join * SAMPLE_RATE
    folders: dict[Path, list[Recording]] = defaultdict(list)
    for recording in recordings:
        folders[Path(recording.relative).parent].append(recording)
    utterances: list[Utterance] = []
    for folder, members in sorted(folders.items()):
        random.Random(f"join {options.seed} {folder}").shuffle(members)
        chains: list[list[Recording]] = [[]]
        length = 0
        for member in members:
            if length and abs(length + member.checked.samples - target) > abs(length - target):
                chains.append([])
                length = 0
            chains[-1].append(member)
            length += member.checked.samples
        if len(chains) > 1 and length < target / 2:
            chains[-2:] = [chains[-2] + chains[-1]]
        for number, chain in enumerate(chains, start=1):
            key = _digest("\n".join(r.key for r in chain))
            utterances.append(Utterance(store / _safe(folder) / f"joined-{number:05d}-{key}.flac", tuple(chain)))
    return utterances


def _convert(utterances: list[Utterance], root: Path, workers: int) -> None:
    """Write the audio that is not there yet."""

    def write(utterance: Utterance) -> None:
        def blocks() -> Iterator[Array]:
            for part in utterance.parts:
                yield from read_mono(root / part.relative, part.checked)

        write_flac(utterance.path, blocks())

    missing = [u for u in utterances if not u.path.exists()]
    for _ in _parallel(write, missing, workers, "converting to 16 kHz mono"):
        pass


def _parallel(function: Callable[[T], R], items: list[T], workers: int, what: str) -> Iterator[R]:
    """Results in order, by threads (libsndfile and soxr run outside Python's lock)."""
    with ThreadPoolExecutor(workers) as pool, progress(what, len(items)) as advance:
        try:
            for result in pool.map(function, items):
                advance(1)
                yield result
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---- splits


def _speaker(recording: Recording, level: int) -> str:
    """The folder that names the speaker; recordings above that level share the deepest folder they have."""
    folders = Path(recording.relative).parent.parts
    return "/".join(folders[:level])


def _folders_needed(options: Options) -> int:
    """How many folders must hold usable recordings for the split asked for."""
    return 2 if options.split_by == "folder" and options.valid_percent > 0 else 1


def _splits_by_folder(recordings: Iterable[Recording], options: Options, root: Path) -> bool:
    count = len({_speaker(r, options.folder_level) for r in recordings})
    if count < _folders_needed(options):
        raise UserError(f"--split-by folder needs two folders with usable recordings, {root} has {count}: use --split-by file")
    return options.split_by == "folder" or (options.split_by == "auto" and count >= MIN_FOLDERS)


def _split(
    utterances: list[Utterance], by_folder: bool, options: Options
) -> tuple[list[Utterance], list[Utterance], list[str]]:
    """(train, valid, folders held out). Random groups join valid while that brings it closer to the wanted share."""
    groups: dict[str, list[Utterance]] = defaultdict(list)
    for number, utterance in enumerate(utterances):
        groups[_speaker(utterance.parts[0], options.folder_level) if by_folder else str(number)].append(utterance)
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


def _part_rows(utterance: Utterance, top: Path, transcripts: Transcripts) -> Iterator[str]:
    start = 0
    for part in utterance.parts:
        end = start + part.checked.samples
        text = transcripts.find(part.relative)
        name = utterance.path.relative_to(top)
        yield f"{name}\t{start / SAMPLE_RATE:.6f}\t{end / SAMPLE_RATE:.6f}\t{_line(part.relative)}\t{text}\n"
        start = end


def _minutes(utterances: list[Utterance]) -> float:
    return math.fsum(u.samples for u in utterances) / SAMPLE_RATE / 60


def _plain(text: str) -> bool:
    """Can stand in a TSV as it is: encodable, no control characters, no blanks at its ends."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return text == text.strip() and text.isprintable()


def _line(text: str) -> str:
    """`text` on one line, without tabs."""
    return text if _plain(text) else ascii(text)[1:-1]


def _safe(path: Path | str) -> str:
    """A relative path of word characters, dots and dashes."""
    return "/".join(re.sub(r"[^\w.-]", "_", p) for p in Path(path).parts)
