"""Reads and checks the layouts of SUPERB's data sets; one line names what is missing, before torch or S3PRL is imported.

Each `check_*` takes the folder that holds all data sets under the names of their archives, and raises `UserError`. Transcripts, lists
and tables are read whole; of recordings the headers of a few per split are read, so that a check of the full sets takes seconds.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import soundfile as sf

from hubert_eff.config import SAMPLE_RATE
from hubert_eff.data.audio import Unusable, check
from hubert_eff.data.lines import decimal, shown
from hubert_eff.errors import UserError
from hubert_eff.utils.progress import progress
from hubert_eff.utils.workers import in_order

LIBRISPEECH, SNIPS, VOXCELEB = "LibriSpeech", "SNIPS", "VoxCeleb1"
QUESST, FLUENT, IEMOCAP, DIARIZATION = "quesst14Database", "fluent_speech_commands_dataset", "IEMOCAP", "diarization"
LIBRISPEECH_SPLITS = ("train-clean-100", "dev-clean", "test-clean")
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ'"
LEXICONS = "lexicon/librispeech-lexicon*.txt"
SNIPS_TRANSCRIPTS, SNIPS_SLOTS = "all.iob.snips.txt", "slots.txt"
SPEAKER_LIST, TRIAL_LIST = "iden_split.txt", "voxceleb1_test_v2.txt"
SPEAKERS = range(10001, 11252)  # VoxCeleb1's ids, which S3PRL's classifier expects
SLOTS = ("action", "object", "location")
KALDI_FILES = ("wav.scp", "utt2spk", "segments", "reco2dur")
SESSIONS = tuple(f"Session{number}" for number in range(1, 6))
EMOTIONS = {"neu", "hap", "exc", "ang", "sad"}
HEADERS = 8  # recordings per split whose header is read
AUDIO = (".wav", ".flac")
LIST_BYTES, SAMPLE_BYTES = 1 << 24, 1 << 12  # bytes that a digest reads: at most of a list, and of a recording


# -- reading ---------------------------------------------------------------------------------------------------------


def librispeech(split: Path) -> dict[Path, str]:
    """The recordings of a LibriSpeech split and their words, in capitals."""
    found = {}
    for transcripts in sorted(split.glob("*/*/*.trans.txt")):
        for line in _lines(transcripts):
            name, _, words = line.partition(" ")
            found[transcripts.with_name(f"{name}.flac")] = words.strip().upper()
    return found


def lexicon(files: Iterable[Path]) -> dict[str, list[str]]:
    """Words and their phones; the first line of a word counts, and the first file."""
    phones: dict[str, list[str]] = {}
    for file in files:
        for line in _lines(file):
            word, *pronunciation = line.split()
            if pronunciation:
                phones.setdefault(word.upper(), pronunciation)
    return phones


def snips(root: Path) -> dict[str, str]:
    """Utterance ids of Audio SNIPS, SPEAKER-snips-SPLIT-NUMBER, and `BOS words EOS <tab> O labels O`."""
    return {line.split(" ", 1)[0]: line.split(" ", 1)[1] for line in _lines(root / SNIPS_TRANSCRIPTS) if " " in line}


def quesst(root: Path, part: str) -> list[Path]:
    """The English recordings of a list of QUESST 2014: `utterances`, `dev` or `eval`."""
    rows = (line.split() for line in _lines(root / "scoring" / f"language_key_{part}.lst"))
    return [root / row[0].split("/", 1)[-1] for row in rows if len(row) == 2 and row[1] == "nnenglish"]


def quesst_truth(root: Path, part: str) -> set[tuple[str, str]]:
    """(query, document) for each document that a query occurs in, for the queries of `dev` or `eval`."""
    rows = (line.split() for line in _lines(root / "scoring" / f"groundtruth_quesst14_{part}" / f"quesst14_{part}.rttm"))
    return {(row[5], row[1]) for row in rows if len(row) > 5 and row[0] == "LEXEME"}


def trials(file: Path) -> list[tuple[bool, str, str]]:
    """Trials of speaker verification: the same speaker or not, and two recordings."""
    rows = [line.split() for line in _lines(file)]
    wrong = next((number for number, row in enumerate(rows, 1) if len(row) != 3 or row[0] not in ("0", "1")), 0)
    if wrong:
        raise UserError(f"{file}, line {wrong}: expected '1|0 RECORDING RECORDING'")
    return [(label == "1", first, second) for label, first, second in rows]


def kaldi(file: Path) -> dict[str, str]:
    """A Kaldi table: the first word of a line and the rest of it."""
    return {line.split(None, 1)[0]: line.split(None, 1)[1].strip() for line in _lines(file) if len(line.split(None, 1)) == 2}


def segments(folder: Path) -> Iterator[tuple[str, str, float, float]]:
    """Recording, speaker, start and end in s of each utterance of a Kaldi folder."""
    speaker = kaldi(folder / "utt2spk")
    for utterance, rest in kaldi(folder / "segments").items():
        recording, *times = rest.split()
        start, end = map(decimal, times) if len(times) == 2 else (None, None)
        if start is None or end is None or not 0 <= start < end:
            raise UserError(f"{folder / 'segments'}: {shown(utterance)!r} is not followed by a recording, a start and an end in seconds")
        yield recording, speaker[utterance], start, end


def files(root: Path) -> Iterator[Path]:
    """All files below a folder in the order of their names, through links to folders, too; each folder once."""
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:  # a link to a folder above it
            subfolders.clear()
            continue
        seen.add(place)
        subfolders.sort()
        yield from (Path(folder, name) for name in sorted(names))


def recordings(root: Path) -> Iterator[Path]:
    """The recordings below a folder, without the extra files of macOS archives (`._NAME.wav`)."""
    return (file for file in files(root) if file.suffix in AUDIO and not file.name.startswith("."))


def digest(roots: Iterable[Path]) -> str:
    """SHA-256 of names and sizes of all files, of the content of lists, and of a part of each recording."""
    listing = hashlib.sha256()
    for root in roots:
        for file in files(root):
            if file.is_file():
                size = file.stat().st_size
                whole = file.suffix not in AUDIO and size <= LIST_BYTES
                listing.update(os.fsencode(file.relative_to(root)) + f" {size}\n".encode())
                listing.update(_content(file, *((0, size) if whole else ((size - SAMPLE_BYTES) // 2, SAMPLE_BYTES))))
    return listing.hexdigest()


def _content(file: Path, start: int, length: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(max(0, start))
        return stream.read(length)


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise UserError(f"no file at {file}")
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text in UTF-8: {error.reason} at byte {error.start}") from error


# -- checking --------------------------------------------------------------------------------------------------------


def check_recordings(roots: Iterable[Path]) -> None:
    """Decode all recordings below some folders. Raises `UserError` for those that are not valid audio: S3PRL would hang, fail or learn from
    noise. Silence is allowed."""
    found = [file for root in roots for file in recordings(root)]
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress("checking recordings", len(found)) as advance:
        faults = []
        for file, fault in zip(found, in_order(pool, _fault, found, ahead=64)):
            advance(1)
            if fault:
                faults.append(f"{file} ({fault})")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{', '.join(faults[:3])}{more}: repair or remove these files, and remove them from the lists that name them")


def _fault(file: Path) -> str | None:
    if not file.is_file():
        return "no regular file"
    try:
        check(file, silent=True)
    except Unusable as reason:
        return str(reason)
    return None


def check_librispeech(data: Path) -> None:
    """LibriSpeech's three splits, transcripts and recordings."""
    root = _folder(data, LIBRISPEECH)
    for split in LIBRISPEECH_SPLITS:
        words = librispeech(_folder(root, split))
        if not words:
            raise UserError(f"{root / split} is empty: expected SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt and recordings in FLAC")
        for recording, text in words.items():
            foreign = sorted(set(text) - set(CHARACTERS) - {" "})
            if foreign or not text:
                what = f"the unknown character '{foreign[0]}'" if foreign else "no words"
                raise UserError(f"the transcript of {recording.stem} in {recording.parent} has {what}: letters, spaces and ' are known")
        _check_audio(words, SAMPLE_RATE)


def check_lexicon(data: Path) -> None:
    """LibriSpeech, and a lexicon that has all its words."""
    check_librispeech(data)
    root = data / LIBRISPEECH
    files = sorted(root.glob(LEXICONS))
    if not files:
        raise UserError(f"no lexicon at {root / LEXICONS}: words and phones, from https://www.openslr.org/11 or s3prl's two lists")
    known = lexicon(files)
    unknown = sorted({w for split in LIBRISPEECH_SPLITS for text in librispeech(root / split).values() for w in text.split()} - set(known))
    if unknown:
        raise UserError(
            f"{files[0].parent} lacks {len(unknown)} words of the transcripts, such as {', '.join(unknown[:3])}: "
            "add lines 'WORD PHONE PHONE' in a file librispeech-lexicon-more.txt"
        )


def check_keywords(data: Path) -> None:
    """Both folders of Speech Commands v1."""
    from .generators.speech_commands import check_keywords, folders

    train, test = folders(data)
    check_keywords(_folder(train.parent, train.name), _folder(test.parent, test.name))


def check_snips(data: Path, speakers: Mapping[str, Sequence[str]]) -> None:
    """Audio SNIPS: transcripts with labels, the list of slots, and recordings of the speakers of each split."""
    root = _folder(data, SNIPS)
    transcripts, slots = snips(root), set(_lines(root / SNIPS_SLOTS)[1:])
    for split, names in speakers.items():
        recordings = [file for file in sorted(_folder(root, split).rglob("*.wav")) if file.stem.split("-")[0] in names]
        if not any(file.stem in transcripts for file in recordings):
            raise UserError(f"{root / split} has no recording, in {SNIPS_TRANSCRIPTS}, of its speakers {', '.join(names)}")
        for file in recordings:
            text = transcripts.get(file.stem)
            if text is None:
                continue
            words, _, labels = (part.split(" ") for part in text.partition("\t"))
            if len(words) != len(labels) or len(words) < 3:
                raise UserError(f"{root / SNIPS_TRANSCRIPTS}: {file.stem} has {len(words)} words and {len(labels)} labels")
            foreign = sorted(set(labels[1:-1]) - slots - {"O"})
            if foreign:
                raise UserError(f"{root / SNIPS_TRANSCRIPTS}: {file.stem} has the slot '{foreign[0]}', which is not in {SNIPS_SLOTS}")
        _check_audio(recordings, SAMPLE_RATE)


def check_speakers(data: Path) -> None:
    """VoxCeleb1 for identification: both folders and the list of its splits."""
    root = _folder(data, VOXCELEB)
    recordings: dict[str, list[Path]] = {"1": [], "2": [], "3": []}
    for line in _lines(_listed(root, SPEAKER_LIST, "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/iden_split.txt")):
        split, _, name = line.strip().partition(" ")
        speaker = name.split("/")[0]
        if split not in recordings or not re.fullmatch(r"id\d{5}", speaker) or int(speaker[2:]) not in SPEAKERS:
            raise UserError(f"{root / SPEAKER_LIST}: '{line}' is not '1|2|3 id10001...id11251/VIDEO/RECORDING.wav'")
        folder = "test" if (root / "test" / "wav" / speaker).is_dir() else "dev"
        recordings[split].append(root / folder / "wav" / name)
    empty = [kind for split, kind in (("1", "training"), ("2", "validation"), ("3", "test")) if not recordings[split]]
    if empty:
        raise UserError(f"{root / SPEAKER_LIST} has no recordings for {' and '.join(empty)}")
    for files in recordings.values():
        _check_audio(files, SAMPLE_RATE)


def check_trials(data: Path) -> None:
    """VoxCeleb1 for verification: recordings of several speakers in `dev`, and the list of trials in `test`."""
    root = _folder(data, VOXCELEB)
    speakers = sorted(path for path in _folder(root, "dev/wav").iterdir() if path.is_dir())
    files = [file for speaker in speakers for file in sorted(speaker.glob("*/*.wav"))]
    if len(speakers) < 2 or not files:
        raise UserError(f"{root}/dev/wav has recordings of {len(speakers)} speakers: expected SPEAKER/VIDEO/RECORDING.wav of two or more")
    if not any(_seconds(file) > 2 for file in _some(files, 64)):
        raise UserError(f"{root}/dev/wav has no recordings longer than 2 s, which training leaves out")
    pairs = trials(_listed(root, TRIAL_LIST, "https://www.openslr.org/49"))
    if {same for same, _, _ in pairs} != {True, False}:
        raise UserError(f"{root / TRIAL_LIST} needs trials of the same speaker (1) and of two speakers (0)")
    _check_audio([root / "test" / "wav" / name for name in sorted({name for _, *both in pairs for name in both})])


def check_quesst(data: Path) -> None:
    """QUESST 2014: the lists of documents and queries, their recordings, and which queries occur where."""
    root = _folder(data, QUESST)
    documents = {file.stem for file in quesst(root, "utterances")}
    for part in ("utterances", "dev", "eval"):
        files = quesst(root, part)
        if not files:
            raise UserError(f"{root}/scoring/language_key_{part}.lst has no English recording (nnenglish)")
        _check_audio(files)
        if part != "utterances":
            queries = {file.stem for file in files}
            if not any(query in queries and document in documents for query, document in quesst_truth(root, part)):
                raise UserError(f"{root}/scoring/groundtruth_quesst14_{part}: none of the English queries occurs in an English document")


def check_commands(data: Path) -> None:
    """Fluent Speech Commands: three tables and their recordings; training has every value of the three slots."""
    root = _folder(data, FLUENT)
    trained: dict[str, set[str]] = {}
    for split in ("train", "valid", "test"):
        table = root / "data" / f"{split}_data.csv"
        try:
            rows = list(csv.DictReader(_lines(table)))
        except csv.Error as error:
            raise UserError(f"{table} cannot be read as a table: {error}") from error
        if not rows:
            raise UserError(f"{table} is empty")
        short = next((number for number, row in enumerate(rows, start=2) if None in row.values() or None in row), None)
        if short:
            raise UserError(f"{table}: row {short} has fewer or more columns than the first")
        missing = [name for name in ("path", *SLOTS) if name not in rows[0]]
        if missing:
            raise UserError(f"{table} has no column {', '.join(missing)}")
        for slot in SLOTS:
            values = {row[slot] for row in rows}
            foreign = sorted(values - trained.setdefault(slot, values))
            if foreign:
                raise UserError(f"{table}: the {slot} '{foreign[0]}' does not occur in train_data.csv, of which the classes are made")
        _check_audio([root / row["path"] for row in rows], SAMPLE_RATE)


def check_diarization(data: Path) -> None:
    """Kaldi folders `train`, `dev` and `test` of mixtures of two speakers."""
    root = _folder(data, DIARIZATION)
    for split in ("train", "dev", "test"):
        folder = _folder(root, split)
        tables = {name: kaldi(folder / name) for name in KALDI_FILES}
        recordings = tables["wav.scp"]
        if not recordings:
            raise UserError(f"{folder / 'wav.scp'} is empty")
        unspoken = sorted(set(tables["segments"]) - set(tables["utt2spk"]))
        if unspoken:
            raise UserError(f"{folder / 'utt2spk'} does not name the speaker of {unspoken[0]}")
        speakers: dict[str, set[str]] = {name: set() for name in recordings}
        for recording, speaker, _, _ in segments(folder):
            speakers.setdefault(recording, set()).add(speaker)
        for name, present in speakers.items():
            if name not in recordings or name not in tables["reco2dur"] or not 1 <= len(present) <= 2:
                raise UserError(f"{folder}: '{name}' has {len(present)} speakers; expected one or two, and lines in wav.scp and reco2dur")
        _check_audio([Path(path) for path in recordings.values() if not path.endswith("|")], SAMPLE_RATE)


def check_iemocap(data: Path) -> None:
    """IEMOCAP: five sessions with recordings and evaluations."""
    root = _folder(data, IEMOCAP)
    for session in SESSIONS:
        recordings = {file.stem: file for file in _folder(root, f"{session}/sentences/wav").glob("*/*.wav")}
        rows = [
            line.split("\t")
            for file in sorted(_folder(root, f"{session}/dialog/EmoEvaluation").glob("*.txt"))
            for line in _lines(file)
            if line.startswith("[")
        ]
        rated = [recordings[row[1]] for row in rows if len(row) > 2 and row[2] in EMOTIONS and row[1] in recordings]
        if not rated:
            raise UserError(f"{root / session} has no recording that EmoEvaluation rates as neu, hap, exc, ang or sad")
        _check_audio(rated)


def _folder(parent: Path, name: str) -> Path:
    folder = parent / name
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}")
    return folder


def _listed(root: Path, name: str, url: str) -> Path:
    if not (root / name).is_file():
        raise UserError(f"no file at {root / name}: it is at {url}")
    return root / name


def _check_audio(files: Iterable[Path], rate: int | None = None) -> None:
    """All of at most 5000 files exist, evenly taken; the headers of a few say audio of one channel, and of `rate` where it matters."""
    files = list(files)
    missing = next((file for file in _some(files, 5000) if not file.is_file()), None)
    if missing:
        raise UserError(f"no recording at {missing}")
    for file in _some(files, HEADERS):
        header = _header(file)
        if header.frames == 0:
            raise UserError(f"{file} holds no audio")
        if header.channels != 1:
            raise UserError(f"{file} has {header.channels} channels: one is expected")
        if rate and header.samplerate != rate:
            raise UserError(f"{file} is sampled at {header.samplerate} Hz: this data set must be at {rate} Hz")


def _header(file: Path) -> sf._SoundFileInfo:
    try:
        return sf.info(file)
    except sf.LibsndfileError as error:
        raise UserError(f"{file} is not audio: {error}") from error


def _seconds(file: Path) -> float:
    return float(_header(file).duration)


def _some(files: Sequence[Path], most: int) -> Sequence[Path]:
    return files[:: max(1, len(files) // most)]
