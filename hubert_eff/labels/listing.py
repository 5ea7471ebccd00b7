"""What there is to use: the recordings of a folder, or the utterances that a lhotse or Kaldi manifest lists."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from .audio import FOREIGN_SUFFIXES, SUFFIXES
from .transcripts import Transcripts


@dataclass(frozen=True, slots=True)
class Item:
    """A recording, or a segment of one, before its audio has been looked at.

    Args:
        name: what tables call it: its path in the folder, or the id of the utterance.
        path: the file, relative to the root of the listing, or absolute.
        speaker: whom a split by folder keeps together; "" where nobody is named.
        group: what `--join` joins, and the folder in the cache.
        start, end: seconds of the file; an `end` of None is that of the file.
        seconds: length that a manifest claims for the whole file.
        text: transcript of an imported utterance.
    """

    name: str
    path: str
    speaker: str
    group: str
    start: float = 0.0
    end: float | None = None
    seconds: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Listing:
    """All items of a source. `layout` says what it is, `transcript` finds the text of an item, `left_out` has (name, reason)."""

    root: Path
    layout: str
    items: list[Item]
    transcript: Callable[[Item], str] = lambda item: item.text
    left_out: list[tuple[str, str]] = field(default_factory=list)


def list_folder(root: Path, skip: set[Path], level: int) -> Listing:
    """The audio files of a folder, with its sub-folders but those of `skip`; links are followed, each folder is read once.

    The speaker is the folder at `level`, 1 for those right below `root`; recordings above it share the deepest folder they have.
    Raises `UserError` where there is no audio.
    """
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
        inside = os.path.relpath(folder, root)
        for file in files:
            suffix = os.path.splitext(file)[1].lower()
            if not file.startswith(".") and suffix in SUFFIXES | FOREIGN_SUFFIXES:
                (names if suffix in SUFFIXES else foreign).append(file if inside == "." else f"{inside}/{file}")
    if not names and not foreign:
        raise UserError(f"no recording in {root}: it must hold {', '.join(sorted(SUFFIXES))} files, in it or its sub-folders")
    texts = Transcripts(root)
    return Listing(
        root,
        "folder",
        [_of_folder(name, level) for name in sorted(names)],
        lambda item: texts.find(item.path),
        [(n, f"format {Path(n).suffix} is not read: convert it to wav or flac") for n in sorted(foreign)],
    )


def _of_folder(name: str, level: int) -> Item:
    folders = name.split("/")[:-1]
    # interned: the names of a few folders, in hundreds of thousands of items
    return Item(name, name, sys.intern("/".join(folders[:level])), sys.intern("/".join(folders)))
