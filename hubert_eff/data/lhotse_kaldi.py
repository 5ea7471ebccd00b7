"""Utterances that a lhotse manifest or a Kaldi data folder lists.

Both are read as plain data: nothing in them is executed, and neither package is needed. Commands, URLs, archives, choices of channels,
mixtures and transforms cannot be read this way and are refused in one line.

    lhotse   NAME.jsonl or NAME.jsonl.gz: cuts, or recordings with the supervisions beside them ("supervisions" for "recordings" in the
             name); or a folder with all cuts, or all recordings and supervisions, in its files
    Kaldi    a folder with wav.scp, and segments, text, utt2spk, utt2dur where they are there

Relative paths start at the current folder, as they do for lhotse and Kaldi.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError
from .lines import decimal, one_line, read_json_lines, read_lines, shown, value_shown
from .sources import Item, Listing

LHOTSE_SUFFIXES = (".jsonl", ".jsonl.gz")
BLANKS = re.compile("[ \t]+")
ARCHIVE = re.compile(r"(^|\s)(ark|scp)(,\w+)*:|\.ark:\d+(\[.*\])?$")  # a position in a Kaldi archive, or a specifier of one


def read_import(source: Path) -> Listing | None:
    """The listing of a lhotse manifest or a Kaldi data folder; None if `source` is another folder. Raises `UserError`: see above."""
    if source.is_dir():
        if (source / "wav.scp").is_file():
            return _kaldi(source)
        files = sorted(f for f in source.iterdir() if f.name.endswith(LHOTSE_SUFFIXES) and f.is_file())
        kinds = {f: kind for f in files if (kind := _first_kind(f, lenient=True)) in ("cut", "recording", "supervision")}
        for file in files if kinds else []:  # a file that cannot be read may be the other half of a pair
            _first_kind(file)
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
        return Listing(root, "lhotse cuts", list(_items(cuts, "cut", _cut).values()))
    known = _items(recordings, "recording", _recording)
    if not supervisions:
        return Listing(root, "lhotse recordings", list(known.values()))
    items = list(_items(supervisions, "supervision", partial(_supervision, known=known)).values())
    paths = {i.path for i in items}
    unused = [(name, "no supervision") for name, item in known.items() if item.path not in paths]
    return Listing(root, "lhotse recordings and supervisions", items, left_out=unused)


def _items(files: list[Path], kind: str, read: Callable[[str, dict[str, Any]], Item]) -> dict[str, Item]:
    """Apply `read` to the lines of files, which must all be of one kind; returns items by id."""
    found: dict[str, Item] = {}
    for where, entry in (line for file in files for line in read_json_lines(file)):
        if _kind(entry) != kind:
            raise UserError(f"{where}: expected a {kind} of lhotse, found {_kind(entry) or value_shown(entry)}")
        item = read(where, entry)
        if item.name in found:
            raise UserError(f"{where}: a {kind} {shown(item.name)!r} was there before: ids must be unique")
        found[item.name] = item
    return found


def _first_kind(file: Path, lenient: bool = False) -> str:
    """The kind of a file's first line; "" if it is not lhotse's or, if `lenient`, not valid JSON."""
    try:
        return next((_kind(entry) for _, entry in read_json_lines(file)), "")
    except UserError:
        if lenient:
            return ""
        raise


def _kind(entry: Any) -> str:
    if not isinstance(entry, dict):
        return ""
    if isinstance(entry.get("type"), str) and entry["type"].endswith("Cut"):
        return "cut"
    if "storage_type" in entry:
        return "features"
    if "sources" in entry:
        return "recording"
    return "supervision" if "recording_id" in entry else ""


def _recording(where: str, entry: dict[str, Any]) -> Item:
    name = _id(where, "recording", entry)
    what, sources, channels = f"{where}: recording {shown(name)!r}", entry.get("sources"), entry.get("channel_ids")
    if not isinstance(sources, list) or not all(isinstance(s, dict) for s in sources):
        raise UserError(f"{what} has no list of sources")
    heard = channels if isinstance(channels, list) else [c for s in sources for c in _list(what, s, "channels")]
    if len(heard) != 1 or len(sources) != 1:
        raise UserError(f"{what} has {len(heard)} channels in {len(sources)} files, only one can be used: write each to a file of its own")
    kind, path = sources[0].get("type"), sources[0].get("source")
    if kind != "file" or not isinstance(path, str):
        raise UserError(
            f"{what} is a {value_shown(kind)}, which is neither run nor fetched: save its audio to files (lhotse: CutSet.save_audios)"
        )
    if entry.get("transforms"):
        raise UserError(f"{what} is transformed when lhotse reads it, which is not done here: save its audio (lhotse: CutSet.save_audios)")
    return Item(name, _absolute(what, path), "", "", seconds=_number(what, entry, "duration"))


def _supervision(where: str, entry: dict[str, Any], known: dict[str, Item]) -> Item:
    name, of = _id(where, "supervision", entry), _string(where, entry, "recording_id")
    what = f"{where}: supervision {shown(name)!r}"
    recording = known.get(of)
    if recording is None:
        raise UserError(f"{what} is of recording {shown(of)!r}, which is not among the recordings")
    return _segment(what, entry, name, recording, [entry])


def _cut(where: str, entry: dict[str, Any]) -> Item:
    name, kind = _id(where, "cut", entry), entry["type"]
    what = f"{where}: cut {shown(name)!r}"
    if kind != "MonoCut":
        raise UserError(f"{what} is a {shown(kind, 20)}, only a MonoCut can be used: save its audio to a file (lhotse: CutSet.save_audios)")
    if not isinstance(entry.get("recording"), dict):
        raise UserError(f"{what} has no recording, perhaps only features: make cuts from recordings")
    said = _list(what, entry, "supervisions")
    if not all(isinstance(s, dict) for s in said):
        raise UserError(f"{what} has no list of supervisions")
    return _segment(what, entry, name, _recording(where, entry["recording"]), said)


def _segment(what: str, entry: dict[str, Any], name: str, recording: Item, said: list[dict[str, Any]]) -> Item:
    channel = entry.get("channel", 0)
    if isinstance(channel, list) and len(channel) != 1:
        raise UserError(f"{what} has {len(channel)} channels, only one can be used: write each to a file of its own")
    start, duration = _number(what, entry, "start"), _number(what, entry, "duration")
    if duration == 0:
        raise UserError(f"{what} has a duration of 0")
    texts = [_string(what, s, "text") for s in sorted(said, key=lambda s: _number(what, s, "start", signed=True))]
    speakers = [speaker for s in said if (speaker := one_line(_string(what, s, "speaker")))]
    speaker = speakers[0] if speakers else ""
    text = one_line(" ".join(texts))
    return replace(recording, name=name, speaker=speaker, group=speaker, start=start, end=start + duration, text=text)


def _id(where: str, kind: str, entry: dict[str, Any]) -> str:
    name = _string(f"{where}: {kind}", entry, "id")
    if not name:
        raise UserError(f"{where}: {kind} has no id")
    return name


def _string(what: str, entry: dict[str, Any], key: str) -> str:
    """A name or a text, "" if there is none; names may be whole numbers."""
    value = entry.get(key)
    text = "" if value is None else str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None
    if text is None or not _is_unicode(text):
        raise UserError(f"{what}: {key} is not text but {value_shown(value)}")
    return text


def _list(what: str, entry: dict[str, Any], key: str) -> list[Any]:
    value = entry.get(key) or []
    if not isinstance(value, list):
        raise UserError(f"{what} has no list of {key} but {value_shown(value)}")
    return value


def _number(what: str, entry: dict[str, Any], key: str, signed: bool = False) -> float:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (-1e9 if signed else 0) <= value < 1e9:
        raise UserError(f"{what}: {key} must be a number of seconds, found {value_shown(value)}")
    return float(value)


def _is_unicode(text: str) -> bool:
    """Whether a text is without lone surrogates, which JSON can escape and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _absolute(what: str, path: str) -> str:
    if "\0" in path or not path.strip() or not _is_unicode(path):
        raise UserError(f"{what}: {shown(ascii(path))} cannot be the path of a file")
    return os.path.abspath(path)


# ---- Kaldi


def _kaldi(root: Path) -> Listing:
    recordings = {name: os.path.abspath(_kaldi_path(where, name, rest)) for name, rest, where in _table(root / "wav.scp")}
    if not recordings:
        raise UserError(f"{root / 'wav.scp'} lists no recording")
    texts, speakers = (
        {name: rest for name, rest, _ in _table(root / file)} if (root / file).is_file() else {} for file in ("text", "utt2spk")
    )
    if (root / "segments").is_file():
        items = [_kaldi_segment(where, name, BLANKS.split(rest), recordings) for name, rest, where in _table(root / "segments")]
        used = {i.path for i in items}
        unused = [(name, "no segment") for name, path in recordings.items() if path not in used]
    else:
        lengths = {name: _float(where, rest) for name, rest, where in _table(root / "utt2dur")} if (root / "utt2dur").is_file() else {}
        items = [Item(name, path, "", "", seconds=lengths.get(name)) for name, path in recordings.items()]
        unused = []
    items = [
        replace(i, speaker=speakers.get(i.name, ""), group=speakers.get(i.name, ""), text=one_line(texts.get(i.name, ""))) for i in items
    ]
    return Listing(root, "Kaldi", items, left_out=unused)


def _table(file: Path) -> Iterator[tuple[str, str, str]]:
    """(key, rest of the line, place) of each line. Raises `UserError` for a key that occurs twice or has nothing behind it."""
    seen: set[str] = set()
    for number, line in read_lines(file, "Kaldi's tables are UTF-8 text, a line for each name"):
        key, *rest = BLANKS.split(line.strip(" \t"), maxsplit=1)
        where = f"{file}, line {number}"
        if not key:
            continue
        if not rest and file.name != "text":
            raise UserError(f"{where}: expected a name and what belongs to it, found {shown(line)!r}")
        if key in seen:
            raise UserError(f"{where}: {shown(key)!r} was there before: names must be unique")
        seen.add(key)
        yield key, rest[0] if rest else "", where


def _kaldi_path(where: str, name: str, rest: str) -> str:
    what = f"{where}: recording {shown(name)!r}"
    if rest.endswith("|") or rest.startswith("|") or rest == "-":
        raise UserError(
            f"{what} is a command ({shown(rest)!r}), which is never run: write what it gives to a wav file (Kaldi: wav-copy), and name that"
        )
    if ARCHIVE.search(rest):
        raise UserError(f"{what} lies in an archive ({shown(rest)!r}), which is not read: copy it to a wav file (Kaldi: wav-copy)")
    return rest


def _kaldi_segment(where: str, name: str, fields: list[str], recordings: dict[str, str]) -> Item:
    what = f"{where}: segment {shown(name)!r}"
    if len(fields) != 3:
        chosen = "names a channel, which cannot be chosen: write the channel to a file of its own"
        raise UserError(f"{what} {chosen if len(fields) == 4 else 'is not of the form: segment recording start end'}")
    if fields[0] not in recordings:
        raise UserError(f"{what} is of recording {shown(fields[0])!r}, which wav.scp does not list")
    start, end = _float(where, fields[1]), _float(where, fields[2], signed=True)
    if 0 <= end <= start:
        raise UserError(f"{what} ends at {end:g} s, before it begins at {start:g} s")
    return Item(name, recordings[fields[0]], "", "", start, None if end < 0 else end)  # -1 is the end of the file


def _float(where: str, text: str, signed: bool = False) -> float:
    value = decimal(text)
    if value is None or (value < 0 and not signed):
        raise UserError(f"{where}: {shown(text, 40)!r} is not a number of seconds")
    return value
