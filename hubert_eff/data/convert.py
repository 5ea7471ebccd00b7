"""The cache of a manifest: recordings, single or joined, as 16 kHz mono FLAC files that are known to be complete."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config import SAMPLE_RATE
from .audio import CANCELED, Array, Unusable, check, decoded, write_flac
from .checking import Recording, parallel
from .index import Index


@dataclass(frozen=True, slots=True)
class Utterance:
    """A line of a manifest: a 16 kHz mono file and the recordings in it, in order. bits: of a copy in the cache; 0: the original.

    Paths are strings, because there may be hundreds of thousands and `Path` takes ten times the memory.
    """

    path: str
    parts: tuple[Recording, ...]
    bits: int = 0

    @property
    def samples(self) -> int:
        """Length at 16 kHz."""
        return sum(p.samples for p in self.parts)


def convert(utterances: list[Utterance], root: Path, store: Path, workers: int) -> list[tuple[Recording, str]]:
    """Write the copies that are not complete in `store`; returns the recordings that cannot be converted, and why.

    The sizes of copies are kept in `store`/converted.jsonl. A copy of another size or length, as a full disk leaves it, is made again.
    Raises `WriteError` on a full disk.
    """
    index = Index(store / "converted.jsonl", 1)
    index.keep()
    missing, damaged = [], 0
    for utterance in utterances:
        if utterance.bits:
            fits = _fits(utterance, index, store)
            damaged += fits is False
            if not fits:
                missing.append(utterance)
    if damaged:
        print(f"{damaged} files in {store} are not whole: they are made again", file=sys.stderr)

    def write(utterance: Utterance) -> tuple[Recording, str] | None:
        try:
            size = write_flac(Path(utterance.path), _audio(utterance, root), utterance.bits)
        except _Lost as lost:
            return lost.recording, str(lost)
        index.add(_name(utterance, store), size)
        return None

    try:
        return [lost for lost in parallel(write, missing, len(missing), workers, "converting to 16 kHz mono") if lost]
    finally:
        index.close()


class _Lost(Exception):
    def __init__(self, recording: Recording, reason: str) -> None:
        super().__init__(reason)
        self.recording = recording


def _audio(utterance: Utterance, root: Path) -> Iterator[Array]:
    """The samples of all parts. Raises `_Lost` for a part that becomes silence or can no longer be read."""
    least = 2.0**-utterance.bits  # half a step
    for part in utterance.parts:
        checked, peak, power = part.checked, 0.0, 0.0
        try:
            for block in decoded(root / part.item.path, checked, part.first, part.frames):
                peak = max(peak, float(abs(block).max(initial=0.0)))
                power += float(block @ block)
                yield block
        except Unusable as error:
            raise _Lost(part, str(error)) from error
        if peak < least:
            raise _Lost(part, f"silent: nothing is heard in it at {utterance.bits} bits")
        whole = part.frames == checked.frames
        if whole and checked.rate > SAMPLE_RATE and power / part.samples < CANCELED * checked.power * checked.gain**2:
            raise _Lost(part, "silent: all of its sound lies above 8 kHz")


def _fits(utterance: Utterance, index: Index, store: Path) -> bool | None:
    """Whether the copy is complete; None if there is none."""
    try:
        file = os.open(utterance.path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError:
        return False
    try:
        head, size = os.pread(file, 26, 0), os.fstat(file).st_size
    except OSError:  # a folder
        return False
    finally:
        os.close(file)
    rate, samples = int.from_bytes(head[18:21], "big") >> 4, int.from_bytes(head[21:26], "big") & 0xFFFFFFFFF
    if not head.startswith(b"fLaC") or rate != SAMPLE_RATE or samples != utterance.samples:
        return False
    name = _name(utterance, store)
    known = index.get(name)
    if known is not None:
        return known[0] == size
    try:  # a copy by an earlier version, or by a run that was killed before it noted the size
        check(Path(utterance.path))
    except Unusable:
        return False
    index.add(name, size)
    return True


def _name(utterance: Utterance, store: Path) -> str:
    return utterance.path[len(os.fspath(store)) + 1 :]
