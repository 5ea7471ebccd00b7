"""Sources of audio: the recordings of a folder, or the utterances that a lhotse or Kaldi manifest lists."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from .audio import FOREIGN_SUFFIXES, SUFFIXES
from .transcripts import Transcripts


@dataclass(frozen=True, slots=True)
class Item:
    """A recording, or a segment of one, before its audio has been looked at.

    Args:
        name: its name in tables: its path in the folder, or the id of the utterance.
        path: the file, relative to the root of the listing, or absolute.
        speaker: the speaker, whose items a split by folder keeps together; "" if unknown.
        group: items that `--join` may join; also the folder in the cache.
        start, end: seconds of the file; None as `end` is the end of the file.
        seconds: length of the whole file according to a manifest.
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
    """All items of a source. `layout` describes it, `transcript` finds the text of an item, `left_out` has (name, reason)."""

    root: Path
    layout: str
    items: list[Item]
    transcript: Callable[[Item], str] = lambda item: item.text
    left_out: list[tuple[str, str]] = field(default_factory=list)


def list_folder(root: Path, skip: set[Path], level: int, pattern: str | None = None) -> Listing:
    """List the audio files of a folder and its sub-folders except `skip`; links are followed, and each folder is read once.

    The speaker is the folder at `level`, 1 being right below `root`; recordings above that level belong to their deepest folder. With
    `pattern`, it is the first group of this regular expression in the relative path, or else the whole match.

    Raises `UserError` if there is no audio, if the pattern is malformed, or if it is found nowhere.
    """
    names: list[str] = []
    left_out: list[tuple[str, str]] = []
    for name, problem in _audio_below(root, skip):
        if problem:
            left_out.append((name, problem))
        else:
            names.append(name)
    if not names and not left_out:
        raise UserError(f"no recording in {root}: it must hold {', '.join(sorted(SUFFIXES))} files, in it or its sub-folders")
    items = [_of_folder(name, level) for name in names] if pattern is None else _by_pattern(names, pattern, left_out)
    texts = Transcripts(root)
    return Listing(root, "folder", sorted(items, key=lambda item: item.name), lambda item: texts.find(item.path), sorted(left_out))


def _audio_below(root: Path, skip: set[Path]) -> Iterator[tuple[str, str]]:
    """Yield the relative path of each file with an audio suffix and of each unreadable folder, with the fault, or "" if there is none."""
    seen = {_identity(path) for path in skip if path.exists()}  # whichever link leads to them
    folders = [""]  # a stack of folders to read
    while folders:
        inside = folders.pop()
        try:
            with os.scandir(root / inside) as found:
                identity = _identity(root / inside)
                entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            if not inside:
                raise UserError(f"{root} cannot be read: {error.strerror}") from error
            yield inside, f"folder not readable ({error.strerror})"
            continue
        if identity in seen and inside:
            continue
        seen.add(identity)
        below = []
        for entry in entries:
            name = f"{inside}/{entry.name}" if inside else entry.name
            suffix = os.path.splitext(entry.name)[1].lower()
            try:
                is_folder, problem = entry.is_dir(), "" if entry.is_file() else "no regular file"
                lost = bool(problem) and not is_folder and not os.path.exists(entry.path)
            except OSError:  # a link that leads back to itself
                is_folder, lost = False, True
            if is_folder:
                below.append(name)
            elif lost and suffix in {"", *SUFFIXES, *FOREIGN_SUFFIXES}:  # of folders, too
                yield name, "a link to nothing"
            elif suffix in FOREIGN_SUFFIXES:
                yield name, f"format {suffix} is not read: convert it to wav or flac"
            elif suffix in SUFFIXES:
                yield name, problem
        folders += reversed(below)


def _identity(folder: Path) -> tuple[int, int]:
    state = os.stat(folder)
    return state.st_dev, state.st_ino


def _of_folder(name: str, level: int) -> Item:
    folders = name.split("/")[:-1]
    # interned, because hundreds of thousands of items share the names of a few folders
    return Item(name, name, sys.intern("/".join(folders[:level])), sys.intern("/".join(folders)))


def _by_pattern(names: list[str], pattern: str, left_out: list[tuple[str, str]]) -> list[Item]:
    """The items of recordings whose path names the speaker; others are added to `left_out`."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--speaker-pattern {pattern!r} is not a regular expression: {error}") from error
    items = []
    for name in names:
        found = expression.search(name)
        speaker = found[min(1, expression.groups)] if found else None
        if speaker:
            items.append(Item(name, name, sys.intern(speaker), sys.intern(speaker)))
        else:
            left_out.append((name, "no speaker: --speaker-pattern is not in its path"))
    if names and not items:
        raise UserError(f"--speaker-pattern {pattern!r} names no speaker in any of {len(names)} paths, such as {min(names)}")
    return items
