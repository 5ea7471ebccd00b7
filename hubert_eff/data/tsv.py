"""Reads fairseq's manifests, SPLIT.tsv, and parts.tsv, which lists the parts of each utterance."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..config import SAMPLE_RATE
from ..errors import UserError
from .lines import read_lines, scan, shown

SAMPLES = re.compile(r"0{,20}\d{1,10}", re.ASCII)  # below 10^10: a week of audio
HINT = "make it with `hubert-eff manifest`"
SAMPLED_FILES = 16  # recordings whose beginnings represent the content of all
SAMPLED_BYTES = 1 << 16  # bytes of each of them


@dataclass(frozen=True)
class Manifest:
    """A fairseq TSV: root folder and (path, samples) of each utterance; `digest` is the SHA-256 of the file."""

    path: Path
    root: Path
    entries: tuple[tuple[str, int], ...]
    digest: str

    @cached_property
    def names(self) -> list[str]:
        """Path of each utterance, below the root."""
        return [name for name, _ in self.entries]

    @cached_property
    def samples(self) -> list[int]:
        """Samples of each utterance."""
        return [samples for _, samples in self.entries]

    @property
    def seconds(self) -> float:
        """Length of all audio."""
        return sum(self.samples) / SAMPLE_RATE

    def content_digest(self) -> str:
        """SHA-256 of the entries and of the beginnings of a few recordings; another root or other line ends do not change it.

        Raises `UserError` if one of these recordings cannot be read.
        """
        digest = hashlib.sha256("".join(f"{name}\t{samples}\n" for name, samples in self.entries).encode())
        for i in spread(len(self.entries), SAMPLED_FILES):
            audio = self.root / self.names[i]
            try:
                with audio.open("rb") as file:
                    digest.update(hashlib.sha256(file.read(SAMPLED_BYTES)).digest())
            except OSError as error:
                raise UserError(f"{audio} of {self.path} cannot be read ({error.strerror}): make the manifest again") from error
        return digest.hexdigest()


def read_manifest(file: Path) -> Manifest:
    """Read a TSV. Raises `UserError` for a line that is not `path <tab> samples`, naming it, and for a file without lines."""
    if not file.is_file():
        raise UserError(f"no manifest {file}: {HINT}, and give the folder it is in")
    digest, root = hashlib.sha256(), ""
    entries: list[tuple[str, int]] = []
    for line in scan(file, HINT, digest):
        text = line.raw.decode()
        name, tab, samples = text.partition("\t")
        if line.number == 1:
            root = name.strip()
            if samples.strip():
                raise UserError(f"{file}, line 1: expected the folder that all paths start from, found {shown(name)!r} and a tab")
            continue
        samples = samples.rstrip().lstrip(" ")
        if not tab or not name.strip() or not SAMPLES.fullmatch(samples):
            raise UserError(f"{file}, line {line.number}: expected a path, a tab and a number of samples, found {shown(text)!r}")
        entries.append((name, int(samples)))
    if not entries:
        raise UserError(f"{file} lists no utterance: its first line is the root folder, each further line a path and its samples ({HINT})")
    return Manifest(file, Path(root), tuple(entries), digest.hexdigest())


def read_parts(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Read number and fields of the lines of parts.tsv after the first, which names the columns.

    Raises `UserError` if one of `columns` is missing, a line has more or fewer fields, or the lines of an utterance are not together.
    """
    names: list[str] = []
    done: set[str] = set()
    last = ""
    for number, line in read_lines(file, HINT):
        fields = line.split("\t")
        if number == 1:
            names = fields
            if not set(columns) <= set(names) or len(set(names)) < len(names):
                needed = " or ".join(map(repr, columns))
                raise UserError(f"{file} lacks a column {needed} in its first line: {HINT}")
            continue
        if len(fields) != len(names):
            raise UserError(f"{file}, line {number}: expected {len(names)} columns, found {len(fields)}: {HINT}")
        row = dict(zip(names, fields, strict=True))
        if row["utterance"] != last:
            if row["utterance"] in done:
                raise UserError(f"{file}, line {number}: {shown(row['utterance'])!r} was there before, its lines must be together: {HINT}")
            done.add(last := row["utterance"])
        yield number, row
    if not names:
        raise UserError(f"{file} is empty: {HINT}")


def spread(total: int, limit: int) -> list[int]:
    """At most `limit` of the indices below `total`, evenly spread, the first included."""
    return sorted({i * total // limit for i in range(limit)}) if total > limit else list(range(total))
