"""Audio arguments of a command: files, folders and manifests, and the name of each recording in the output."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .sources import Listing, list_folder
from .tsv import read_manifest

MANIFEST = ".tsv"


def recordings(given: Sequence[str | os.PathLike[str]]) -> list[tuple[Path, str]]:
    """(path, name) of each recording, in the order given.

    Args:
        given: audio files; folders, searched with their sub-folders; manifests of `hubert-eff manifest`, SPLIT.tsv.

    Returns:
        Each path with its name, without suffix: the name of a file, or the path of a recording below its folder or manifest. So a name
        does not depend on what else is given. Names that would be the same keep their suffix or, if need be, folders above.

    Raises:
        UserError: nothing is given, a file is given twice, or a manifest is damaged. A folder without recordings is returned itself: the
            caller reports what is wrong with it and may continue with the others.
    """
    found: list[tuple[Path, Path]] = []  # (path, name with its suffix)
    for entry in map(Path, given):
        if os.path.isdir(entry) and (listing := _listed(entry)) is not None:
            names = sorted(
                [item.path for item in listing.items] + [name for name, _ in listing.left_out]
            )  # the caller reports what is wrong
            found += [(entry / name, Path(name)) for name in names]
        elif entry.suffix == MANIFEST:
            manifest = read_manifest(entry)
            found += [(manifest.root / name, Path(name)) for name in manifest.names]
        else:
            found.append((entry, Path(entry.name)))
    if not found:
        raise UserError("no audio files are given")
    for path, times in Counter(Path(os.path.abspath(path)) for path, _ in found).items():
        if times > 1:
            raise UserError(f"{path} is given twice")
    return list(zip((path for path, _ in found), _names(found)))


def _listed(folder: Path) -> Listing | None:
    """The recordings of a folder; None if there are none."""
    try:
        return list_folder(folder, set(), 1)
    except UserError:
        return None


def _names(found: Sequence[tuple[Path, Path]]) -> list[str]:
    level = [0] * len(found)
    names = [_name(path, name, 0) for path, name in found]
    while True:  # among equal names, those in the shortest form take the next longer one
        same: dict[str, list[int]] = defaultdict(list)
        for i, name in enumerate(names):
            same[name].append(i)
        groups = [group for group in same.values() if len(group) > 1]
        if not groups:
            return names
        for group in groups:
            least = min(level[i] for i in group)
            for i in group:
                if level[i] == least:
                    level[i] += 1
                    names[i] = _name(*found[i], level[i])


def _name(path: Path, name: Path, level: int) -> str:
    """The name without suffix, with it, and then with more and more of the folders above."""
    if level == 0:
        return _text(name.with_suffix(""))
    above = Path(os.path.abspath(path)).parts[1:]  # without the root
    return _text(Path(*above[max(0, len(above) - len(name.parts) - level + 1) :]))


def _text(path: Path) -> str:
    """A path as a name; bytes that are not UTF-8 are spelled out, since a name in an archive cannot hold them."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
