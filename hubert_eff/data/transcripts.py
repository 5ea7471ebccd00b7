"""Transcripts beside recordings, in the layouts of common corpora."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from .lines import one_line

_DIGITS = "zero one two three four five six seven eight nine".split()


class Transcripts:
    """Finds the transcript of a recording in a folder.

    It tries, in this order: DIR/transcripts.tsv (`relative path <tab> text`), a `.txt` or `.lab` file of the same name beside the audio,
    LibriSpeech's `*.trans.txt` (`name text`) in its folder, the digit in a name of the Free Spoken Digit Dataset
    (`SPEAKER/DIGIT_SPEAKER_INDEX`). Files that cannot be read as UTF-8 do not count, since a part of a transcript would be wrong; nor do
    names with two different transcripts in one table.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.table = _pairs(root / "transcripts.tsv", "\t") if (root / "transcripts.tsv").is_file() else {}
        self._of_folder = lru_cache(maxsize=64)(_librispeech)
        self._names = lru_cache(maxsize=64)(_names)

    def find(self, relative: str) -> str:
        """The transcript of the recording at `relative`, on one line; empty if there is none."""
        if relative in self.table:
            return self.table[relative]
        path = self.root / relative
        for suffix in (".txt", ".lab"):
            beside = path.with_suffix(suffix)
            if beside.name in self._names(path.parent):
                return one_line(_text(beside))
        of_folder = self._of_folder(path.parent)
        if path.stem in of_folder:
            return of_folder[path.stem]
        digit = re.fullmatch(rf"(\d)_{re.escape(path.parent.name)}_\d+", path.stem)
        return _DIGITS[int(digit[1])] if digit else ""


def _names(folder: Path) -> frozenset[str]:
    with os.scandir(folder) as entries:
        return frozenset(e.name for e in entries if e.name.endswith((".txt", ".lab")) and os.path.isfile(e.path))


def _librispeech(folder: Path) -> dict[str, str]:
    return {name: text for path in sorted(folder.glob("*.trans.txt")) if path.is_file() for name, text in _pairs(path, " ").items()}


def _pairs(path: Path, separator: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in _text(path, errors="surrogateescape").split("\n"):
        name, separated, text = line.partition(separator)
        if separated:
            name, text = name.strip(), one_line(text) if _is_utf8(text) else ""
            found[name] = text if found.get(name, text) == text else ""
    return found


def _text(path: Path, errors: str = "strict") -> str:
    """The content of a file, with line feeds for line ends of any kind."""
    try:
        return path.read_text(encoding="utf-8-sig", errors=errors)
    except (OSError, UnicodeDecodeError):
        return ""


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)
