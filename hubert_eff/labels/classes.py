"""Reads files of labels: SPLIT.km, with a line of classes per utterance, and dict.km.txt, which lists the classes."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..data.lines import read_lines, scan, shown
from ..errors import UserError

COUNT = re.compile(r"\d{1,18}", re.ASCII)


@dataclass(frozen=True)
class Labels:
    """A checked file of labels: the position of each line in bytes, and a summary of its content.

    `counts` (N,) are labels per line; `digest` is the SHA-256 of the file. Lines stay in the file, because 60,000 hours take gigabytes.
    """

    file: Path
    starts: npt.NDArray[np.int64]  # (N,)
    lengths: npt.NDArray[np.int64]  # (N,)
    sums: npt.NDArray[np.uint32]  # (N,)
    counts: npt.NDArray[np.int64]  # (N,)
    digest: str

    def __len__(self) -> int:
        """The number of lines."""
        return len(self.starts)

    def line(self, index: int) -> str:
        """Read a line again. Raises `UserError` if it has changed since it was checked."""
        length = int(self.lengths[index])
        try:
            with self.file.open("rb") as stream:
                stream.seek(int(self.starts[index]))
                raw = stream.read(length)
        except OSError as error:
            raise UserError(f"{self.file} cannot be read any more ({error.strerror})") from error
        if len(raw) != length or zlib.crc32(raw) != self.sums[index]:
            raise UserError(f"{self.file} has changed since it was checked: line {index + 1} differs")
        return raw.decode()


def read_labels(file: Path, classes: Collection[str], classes_from: str) -> Labels:
    """Check a file of labels. `classes_from` says where the `classes` are listed.

    Raises `UserError` for a missing file, a line without labels, or a label that is not among `classes`; see also `lines.scan`.
    """
    if not file.is_file():
        raise UserError(f"no labels {file}: make them with `hubert-eff labels`, and point task.label_dir to their directory")
    known = {name.encode() for name in classes}
    digest = hashlib.sha256()
    found: list[tuple[int, int, int, int]] = []
    for line in scan(file, "make the labels again", digest):
        # fairseq also splits at blanks outside ASCII
        labels = line.raw.split() if line.raw.isascii() else [label.encode() for label in line.raw.decode().split()]
        foreign = set(labels) - known
        if foreign:
            raise UserError(
                f"{file} line {line.number}: class {shown(min(foreign).decode(), 20)} is not among the {len(known)} of {classes_from}: "
                "the two belong to different k-means models, make both with one `hubert-eff labels`"
            )
        if not labels:
            raise UserError(f"{file} line {line.number} holds no label: make the labels again")
        found.append((line.start, len(line.raw), zlib.crc32(line.raw), len(labels)))
    columns = np.array(found, dtype=np.int64).reshape(-1, 4).T
    return Labels(file, columns[0], columns[1], columns[2].astype(np.uint32), columns[3], digest.hexdigest())


def read_dictionary(file: Path) -> list[tuple[str, int]]:
    """Read the classes of a fairseq dictionary, in order, with their counts. Raises `UserError` that names a malformed line."""
    if not file.is_file():
        raise UserError(f"no dictionary {file}: make it with `hubert-eff labels`, and point task.label_dir to its directory")
    classes: dict[str, int] = {}
    for number, line in read_lines(file, "make the labels again"):
        fields = line.split()
        if len(fields) != 2 or not COUNT.fullmatch(fields[1]):
            raise UserError(f"{file} is not a fairseq dictionary: line {number} is not '<class> <count>' but {shown(line)!r}")
        if fields[0] in classes:
            raise UserError(f"{file} is not a fairseq dictionary: line {number} lists {shown(fields[0])!r} again")
        classes[fields[0]] = int(fields[1])
    if not classes:
        raise UserError(f"{file} is not a fairseq dictionary: it lists no class")
    return list(classes.items())


def file_digest(file: Path) -> str | None:
    """SHA-256 of a file; None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()
