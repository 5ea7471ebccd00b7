"""Finds out which listed recordings and segments are usable, and keeps the results for the next run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from ..config import SAMPLE_RATE
from ..errors import UserError
from ..utils.progress import progress
from ..utils.workers import in_order
from .audio import DIRECT_SUFFIXES, Checked, Unusable, check
from .index import Index
from .sources import Item, Listing

EDGE = 0.01  # seconds: a segment that begins and ends this close to the ends of its file is the whole file
OVERSHOOT = 0.5  # seconds by which a segment may exceed its file; it is then cut at the end of the file
DEVIATION = 0.1  # seconds, or 1%, by which a file may differ from the length in its manifest

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Recording:
    """A usable item: the key of its content, the result of decoding its file, and its first frame and number of frames in that file."""

    item: Item
    key: str
    checked: Checked
    first: int
    frames: int

    @property
    def samples(self) -> int:
        """Length at 16 kHz."""
        return round(self.frames * SAMPLE_RATE / self.checked.rate)

    @property
    def direct(self) -> bool:
        """Whether the file can be used in place: whole, 16 kHz mono within full scale, with a format and a name that fairseq can read."""
        whole = self.frames == self.checked.frames and self.checked.peak <= 1.0
        fits = (self.checked.rate, self.checked.channels) == (SAMPLE_RATE, 1) and os.path.splitext(self.item.path)[1] in DIRECT_SUFFIXES
        return whole and fits and plain(self.item.path)


def check_all(
    listing: Listing, store: Path, least: float, most: float | None, speakers: int, workers: int
) -> tuple[list[Recording], list[tuple[str, str]]]:
    """Decode every file once. Returns the usable items in the order of their files, and (name, reason) for the others.

    Args:
        store: folder of the cache; checked.jsonl is kept there once items of this many `speakers` have turned out to be usable.
        least, most: limits of the length in seconds; shorter and longer items are left out.
        workers: number of threads.

    Raises:
        UserError: nothing is usable.
    """
    index = Index(store / "checked.jsonl", len(fields(Checked)))

    def look(same: list[Item]) -> list[tuple[Item, Recording | str]]:
        path = listing.root / same[0].path
        key = _key(path)
        known = index.get(key)
        if known is not None:
            checked = Checked(int(known[0]), int(known[1]), int(known[2]), *known[3:])
        else:
            try:
                checked = check(path)
            except Unusable as error:
                reason = f"{error}: {plain_line(str(path))}" if str(error) == "not there" else str(error)
                return [(item, reason) for item in same]
            index.add(key, *astuple(checked))
        return [(item, _judge(item, key, checked, least, most)) for item in same]

    recordings: list[Recording] = []
    left_out = list(listing.left_out)
    seen: set[str] = set()
    items = sorted(listing.items, key=lambda i: (i.path, i.start, i.name))
    files = (list(same) for _, same in groupby(items, key=lambda i: i.path))
    count = len({i.path for i in items})
    try:
        for results in parallel(look, files, count, workers, "checking recordings"):
            for item, result in results:
                if isinstance(result, str):
                    left_out.append((item.name, result))
                else:
                    recordings.append(result)
                    seen.add(item.speaker)
            if len(seen) >= speakers:
                index.keep()
    finally:
        index.close()
    left_out.sort()
    if not recordings:
        raise nothing_usable(listing, left_out)
    return recordings, left_out


def nothing_usable(listing: Listing, left_out: list[tuple[str, str]]) -> UserError:
    """The error to raise if everything is left out."""
    name, reason = left_out[0]
    more = f", and {len(left_out) - 1} more" if len(left_out) > 1 else ""
    return UserError(f"no usable recording in {listing.root}: {plain_line(name)} ({reason}){more}")


def parallel(function: Callable[[T], R], items: Iterable[T], count: int, workers: int, what: str) -> Iterator[R]:
    """Results of `count` items in order, by threads (libsndfile and soxr run outside Python's lock)."""
    with ThreadPoolExecutor(workers) as pool, progress(what, count) as advance:
        for result in in_order(pool, function, items, 4 * workers):
            advance(1)
            yield result


def digest(text: str) -> str:
    """A digest of 16 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def plain(text: str) -> bool:
    """Whether a text fits into a TSV unchanged: encodable, without control characters, without blanks at its ends."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return text == text.strip() and text.isprintable()


def plain_line(text: str) -> str:
    """`text` in a form for a TSV or a terminal."""
    return text if plain(text) else ascii(text)[1:-1]


def _judge(item: Item, key: str, checked: Checked, least: float, most: float | None) -> Recording | str:
    length = checked.frames / checked.rate
    if item.seconds is not None and abs(item.seconds - length) > max(DEVIATION, 0.01 * item.seconds):
        return f"not the file of its manifest: {length:.2f} s, expected {item.seconds:.2f} s"
    end = length if item.end is None else item.end
    if end > length + OVERSHOOT or item.start >= length:
        return f"segment outside its file: it ends at {end:.2f} s, the file at {length:.2f} s"
    first, last = 0, checked.frames
    if item.start > EDGE or end < length - EDGE:
        first, last = round(item.start * checked.rate), min(round(end * checked.rate), checked.frames)
        key = digest(f"{key}\n{first}\n{last}")
    seconds = (last - first) / checked.rate
    if seconds < least:
        return f"too short: {seconds:.3f} s is below --min-seconds {least:g}"
    if most is not None and seconds > most:
        return f"too long: {seconds:.1f} s is above --max-seconds {most:g}"
    return Recording(item, key, checked, first, last - first)


def _key(path: Path) -> str:
    try:
        state = path.stat()
    except (OSError, ValueError):  # `check` says why
        return ""
    return digest(f"{path}\n{state.st_size}\n{state.st_mtime_ns}")
