"""Utterances that a lhotse manifest or a Kaldi data folder lists.

Both are read as plain data: nothing that they name is executed, neither package is needed. What cannot be read as it is meant (commands,
URLs, archives, a choice of channels, mixtures, transforms) is refused in one line.

    lhotse   NAME.jsonl or NAME.jsonl.gz: cuts, or recordings with the supervisions beside them ("supervisions" for "recordings" in the
             name); or a folder with all cuts, or all recordings and supervisions, in its files
    Kaldi    a folder with wav.scp, and segments, text, utt2spk, utt2dur where they are there

Relative paths start at the current folder, as they do for lhotse and Kaldi.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from .listing import Item, Listing

LHOTSE_SUFFIXES = (".jsonl", ".jsonl.gz")
ARCHIVE = re.compile(r"(^|\s)(ark|scp)(,\w+)*:|\.ark:\d+(\[.*\])?$")  # a place inside a Kaldi archive, or a specifier of one

Entry = tuple[str, dict[str, Any]]  # where it stands, what it says


def read_import(source: Path) -> Listing | None:
    """The listing of a lhotse manifest or a Kaldi data folder; None if `source` is another folder. Raises `UserError`: see above."""
    if source.is_dir():
        if (source / "wav.scp").is_file():
            return _kaldi(source)
        files = sorted(f for f in source.iterdir() if f.name.endswith(LHOTSE_SUFFIXES))
        kinds = {f: kind for f in files if (kind := _first_kind(f, lenient=True)) in ("cut", "recording", "supervision")}
        return _lhotse(source, kinds) if kinds else None
    if source.is_file() and source.name == "wav.scp":
        return _kaldi(source.parent)
    if source.is_file() and source.name.endswith(LHOTSE_SUFFIXES):
        beside = source.with_name(source.name.replace("recordings", "supervisions"))
        return _lhotse(source.parent, {f: _first_kind(f) for f in (source, beside) if f.is_file()})
    raise UserError(
        f"{source} is not a folder: name a folder of wav, flac or ogg files, a lhotse manifest (.jsonl, .jsonl.gz) or a Kaldi data folder"
    )


# ---- lhotse


def _lhotse(root: Path, kinds: dict[Path, str]) -> Listing:
    cuts, recordings, supervisions = ([f for f in kinds if kinds[f] == k] for k in ("cut", "recording", "supervision"))
    for file, kind in kinds.items():
        if kind not in ("cut", "recording", "supervision"):
            raise UserError(f"{file} holds no recordings, supervisions or cuts of lhotse: its first line is {kind or 'something else'}")
    if cuts and recordings:
        raise UserError(f"{root} holds both cuts and recordings: name one file, e.g. {cuts[0]}")
    if not cuts and not recordings:
        raise UserError(f"{supervisions[0]} lists supervisions only: name the file of the recordings, or the folder that holds both")
    if cuts:
        return Listing(root, "lhotse cuts", _unique(_cut(*entry) for file in cuts for entry in _entries(file, "cut")))
    known: dict[str, Item] = {}
    for where, entry in (e for file in recordings for e in _entries(file, "recording")):
        item = _recording(where, entry)
        if item.name in known:
            raise UserError(f"{where}: a recording {item.name!r} was there before: ids must be unique")
        known[item.name] = item
    if not supervisions:
        return Listing(root, "lhotse recordings", list(known.values()))
    items = _unique(_supervision(*entry, known) for file in supervisions for entry in _entries(file, "supervision"))
    paths = {i.path for i in items}
    unused = [(name, "no supervision") for name, item in known.items() if item.path not in paths]
    return Listing(root, "lhotse recordings and supervisions", items, left_out=unused)


def _entries(file: Path, kind: str | None = None) -> Iterator[Entry]:
    """The lines of a file of JSON lines; with `kind`, all must be such."""
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                entry = json.loads(line)
                if kind and _kind(entry) != kind:
                    raise UserError(f"{file}, line {number}: expected a {kind} of lhotse, found {line.strip()[:60]!r}")
                yield f"{file}, line {number}", entry
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON lines: {str(error).splitlines()[0]}") from error


def _first_kind(file: Path, lenient: bool = False) -> str:
    """The kind of a file's first line; "" if it is nothing of lhotse's; `lenient`: also if it is no JSON."""
    try:
        return next((_kind(entry) for _, entry in _entries(file)), "")
    except UserError:
        if lenient:
            return ""
        raise


def _kind(entry: Any) -> str:
    if not isinstance(entry, dict):
        return ""
    if str(entry.get("type", "")).endswith("Cut"):
        return "cut"
    if "storage_type" in entry:
        return "features"
    if "sources" in entry:
        return "recording"
    return "supervision" if "recording_id" in entry else ""


def _recording(where: str, entry: dict[str, Any]) -> Item:
    name, sources, channels = str(entry.get("id", "")), entry.get("sources"), entry.get("channel_ids")
    what = f"{where}: recording {name[:60]!r}"
    if not isinstance(sources, list) or not all(isinstance(s, dict) for s in sources):
        raise UserError(f"{what} has no list of sources")
    heard = channels if isinstance(channels, list) else [c for s in sources for c in s.get("channels", [])]
    if len(heard) != 1 or len(sources) != 1:
        raise UserError(f"{what} has {len(heard)} channels in {len(sources)} files, one can be used: write each to a file of its own")
    kind, path = sources[0].get("type"), sources[0].get("source")
    if kind != "file" or not isinstance(path, str):
        raise UserError(
            f"{what} is a {str(kind)[:20]!r}, which is neither run nor fetched: save its audio to files (lhotse: CutSet.save_audios)"
        )
    if entry.get("transforms"):
        raise UserError(f"{what} is transformed when lhotse reads it, which is not done here: save its audio (lhotse: CutSet.save_audios)")
    return Item(name, os.path.abspath(path), "", "", seconds=_number(what, entry, "duration"))


def _supervision(where: str, entry: dict[str, Any], known: dict[str, Item]) -> Item:
    name, of = str(entry.get("id", "")), str(entry.get("recording_id", ""))
    what = f"{where}: supervision {name[:60]!r}"
    recording = known.get(of)
    if recording is None:
        raise UserError(f"{what} is of recording {of[:60]!r}, which is not among the recordings")
    return _segment(what, entry, name, recording, [entry])


def _cut(where: str, entry: dict[str, Any]) -> Item:
    name, kind = str(entry.get("id", "")), str(entry["type"])
    what = f"{where}: cut {name[:60]!r}"
    if kind != "MonoCut":
        raise UserError(f"{what} is a {kind[:20]}, only a MonoCut can be used: save its audio to a file (lhotse: CutSet.save_audios)")
    if not isinstance(entry.get("recording"), dict):
        raise UserError(f"{what} has no recording, only features perhaps: make cuts from recordings")
    said = entry.get("supervisions") or []
    if not isinstance(said, list) or not all(isinstance(s, dict) for s in said):
        raise UserError(f"{what} has no list of supervisions")
    return _segment(what, entry, name, _recording(where, entry["recording"]), said)


def _segment(what: str, entry: dict[str, Any], name: str, recording: Item, said: list[dict[str, Any]]) -> Item:
    channel = entry.get("channel", 0)
    if isinstance(channel, list) and len(channel) != 1:
        raise UserError(f"{what} is of {len(channel)} channels, one can be used: write each to a file of its own")
    start, duration = _number(what, entry, "start"), _number(what, entry, "duration")
    if duration == 0:
        raise UserError(f"{what} has a duration of 0")
    texts = (str(s.get("text") or "") for s in sorted(said, key=lambda s: _number(what, s, "start", signed=True)))
    speaker = next((str(s["speaker"]) for s in said if s.get("speaker")), "")
    text = " ".join(" ".join(texts).split())
    return replace(recording, name=name, speaker=speaker, group=speaker, start=start, end=start + duration, text=text)


def _number(what: str, entry: dict[str, Any], key: str, signed: bool = False) -> float:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or (value < 0 and not signed):
        raise UserError(f"{what}: {key} must be a number of seconds, found {str(value)[:40]!r}")
    return float(value)


# ---- Kaldi


def _kaldi(root: Path) -> Listing:
    recordings = {name: (os.path.abspath(_kaldi_path(where, name, rest)), where) for name, rest, where in _table(root / "wav.scp")}
    if not recordings:
        raise UserError(f"{root / 'wav.scp'} lists no recording")
    texts, speakers = (
        {name: rest for name, rest, _ in _table(root / file)} if (root / file).is_file() else {} for file in ("text", "utt2spk")
    )
    if (root / "segments").is_file():
        items = [_kaldi_segment(where, name, rest.split(), recordings) for name, rest, where in _table(root / "segments")]
        used = {i.path for i in items}
        unused = [(name, "no segment") for name, (path, _) in recordings.items() if path not in used]
    else:
        lengths = {name: _float(where, rest) for name, rest, where in _table(root / "utt2dur")} if (root / "utt2dur").is_file() else {}
        items = [Item(name, path, "", "", seconds=lengths.get(name)) for name, (path, _) in recordings.items()]
        unused = []
    items = [
        replace(i, speaker=speakers.get(i.name, ""), group=speakers.get(i.name, ""), text=" ".join(texts.get(i.name, "").split()))
        for i in items
    ]
    return Listing(root, "Kaldi", items, left_out=unused)


def _table(file: Path) -> Iterator[tuple[str, str, str]]:
    """(key, rest of the line, where it stands) of each line. Raises `UserError` for a key that is there twice or has nothing behind it."""
    seen: set[str] = set()
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                key, *rest = line.strip().split(maxsplit=1)
                where = f"{file}, line {number}"
                if not rest and file.name != "text":
                    raise UserError(f"{where}: expected a name and what belongs to it, found {line.strip()[:60]!r}")
                if key in seen:
                    raise UserError(f"{where}: {key[:60]!r} was there before: names must be unique")
                seen.add(key)
                yield key, rest[0] if rest else "", where
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text: {error}") from error


def _kaldi_path(where: str, name: str, rest: str) -> str:
    what = f"{where}: recording {name[:60]!r}"
    if rest.endswith("|") or rest.startswith("|") or rest == "-":
        raise UserError(
            f"{what} is a command ({rest[:60]!r}), which is never run: write what it gives to a wav file (Kaldi: wav-copy), and name that"
        )
    if ARCHIVE.search(rest):
        raise UserError(f"{what} lies in an archive ({rest[:60]!r}), which is not read: copy it to a wav file (Kaldi: wav-copy)")
    return rest


def _kaldi_segment(where: str, name: str, fields: list[str], recordings: dict[str, tuple[str, str]]) -> Item:
    what = f"{where}: segment {name[:60]!r}"
    if len(fields) != 3:
        chosen = "names a channel, which cannot be chosen: write the channel to a file of its own"
        raise UserError(f"{what} {chosen if len(fields) == 4 else 'is not of the form: segment recording start end'}")
    if fields[0] not in recordings:
        raise UserError(f"{what} is of recording {fields[0][:60]!r}, which wav.scp does not list")
    start, end = _float(where, fields[1]), _float(where, fields[2], signed=True)
    if 0 <= end <= start:
        raise UserError(f"{what} ends at {end:g} s, before it begins at {start:g} s")
    return Item(name, recordings[fields[0]][0], "", "", start, None if end < 0 else end)  # -1 is the file's end


def _float(where: str, text: str, signed: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (value < 0 and not signed):
        raise UserError(f"{where}: {text[:40]!r} is no number of seconds")
    return value


def _unique(items: Iterator[Item]) -> list[Item]:
    found: dict[str, Item] = {}
    for item in items:
        if item.name in found:
            raise UserError(f"two utterances have the id {item.name[:60]!r}, which must be unique: {found[item.name].path}, {item.path}")
        found[item.name] = item
    return list(found.values())
