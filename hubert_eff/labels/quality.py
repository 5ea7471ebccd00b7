"""Measures how well labels agree with phones, as HuBERT does (Hsu et al., 2021, section IV-C).

From the joint distribution p(y, z) of phone y and cluster z over frames:

    phone purity     sum_z p(z) max_y p(y | z)    accuracy of the best map from clusters to phones
    cluster purity   sum_y p(y) max_z p(z | y)    its counterpart; falls as clusters grow in number
    PNMI             I(y; z) / H(y)               share of the uncertainty about the phone that the cluster removes

A frame belongs to the phone at its center; frames outside all phone intervals are left out.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.lines import decimal, read_json, read_lines, shown
from ..data.tsv import Manifest, read_manifest, read_parts
from ..errors import UserError
from .features import CENTER
from .record import HINT, read_record

Intervals = list[tuple[float, float, str]]  # start s, end s, label; in order of time
Parts = list[tuple[float, float, str, float]]  # start s, end s, real path of the recording, the second of it at the start

MOST_CELLS = 20_000_000  # cells in the table of phones and clusters


@dataclass(frozen=True)
class Phones:
    """Phone intervals of recordings, and the recordings in each utterance of a manifest."""

    intervals: dict[str, Intervals]  # by real path
    sources: dict[str, Parts]
    inventory: dict[str, int]  # phone -> row of a table

    @classmethod
    def read(cls, alignments: Path, tables: Path, clusters: int) -> Phones:
        """Read what `label_quality` needs. Raises `UserError` for missing or malformed files, or a table too large for `clusters`."""
        intervals = _read_alignments(alignments)
        inventory = {label: i for i, label in enumerate(sorted({s[2] for spans in intervals.values() for s in spans}))}
        if len(inventory) * clusters > MOST_CELLS:
            raise UserError(
                f"{alignments} has {len(inventory)} different phones, too many for {clusters} clusters: does the last column hold phones?"
            )
        return cls(intervals, _sources(tables), inventory)

    def of(self, root: Path, path: str, samples: int, frames: int, rate: float) -> npt.NDArray[np.int64]:
        """The phone at the center of each frame of an utterance, (frames,); -1 for none."""
        whole: Parts = [(0.0, samples, os.path.realpath(root / path), 0.0)]
        spans = [
            (begin + max(start - first, 0.0), min(begin + end - first, finish), self.inventory[label])
            for begin, finish, source, first in self.sources.get(path, whole)
            for start, end, label in self.intervals.get(source, [])
            if end > first and start - first < finish - begin
        ]
        if not spans:
            return np.full(frames, -1, dtype=np.int64)
        starts, ends, labels = (np.array(column) for column in zip(*spans, strict=True))
        times = np.arange(frames) / rate + CENTER
        at = np.searchsorted(starts, times, side="right") - 1
        return np.where((at >= 0) & (times < ends[at]), labels[at], -1).astype(np.int64)


def purities(joint: npt.NDArray[np.floating[Any] | np.integer[Any]]) -> dict[str, float]:
    """The measures of a table of frame counts (phones, clusters)."""
    p = joint / joint.sum()
    phones, clusters = p.sum(1), p.sum(0)
    entropy = -float((phones[phones > 0] * np.log(phones[phones > 0])).sum())
    rows, columns = np.nonzero(p)
    mutual = float((p[rows, columns] * np.log(p[rows, columns] / (phones[rows] * clusters[columns]))).sum())
    return {
        "phone_purity": float(p.max(0).sum()),
        "cluster_purity": float(p.max(1).sum()),
        "pnmi": mutual / entropy if entropy > 0 else 0.0,
    }


def label_quality(labels: str | Path, alignments: str | Path, manifest: str | Path | None = None) -> dict[str, Any]:
    """Measure every split of a label folder, and all of them together.

    Args:
        labels: folder made by `hubert-eff labels`.
        alignments: lines of `path <tab> tier <tab> start s <tab> end s <tab> label`, with phones in the tier "phone"; paths are relative to
            the file's folder and name the recordings, even if the manifest's utterances were converted or joined from them.
        manifest: folder of the manifests (default: the one that labels.json names).

    Returns:
        For each split and for "all": the three measures, frames, frames with a phone, phones, and the share of the most frequent phone.

    Raises:
        UserError: a file is missing or malformed, labels do not belong to the manifest, or no recording has phones.
    """
    folder = Path(labels)
    record = read_record(folder)
    if record is None or record.rate is None or record.clusters is None or not record.splits or not (manifest or record.manifest):
        raise UserError(f"no labels in {folder}: it needs the labels.json of `hubert-eff labels`")
    rate, clusters, tables = record.rate, record.clusters, Path(manifest or record.manifest or "")
    phones = Phones.read(Path(alignments), tables, clusters)
    result: dict[str, Any] = {}
    total = np.zeros((len(phones.inventory), clusters), dtype=np.int64)
    total_frames = 0
    for name in record.splits:
        table = read_manifest(tables / f"{name}.tsv")
        record.check_manifest(table)
        joint, frames = _count(folder / f"{name}.km", table, phones, rate, clusters)
        total += joint
        total_frames += frames
        if joint.any():
            result[name] = report(joint, frames)
    if not total.any():
        raise foreign_alignments(alignments, tables, phones, table)
    return {"labels": str(folder), "k": clusters, "rate": rate, "splits": result, "all": report(total, total_frames)}


def foreign_alignments(alignments: str | Path, tables: Path, phones: Phones, table: Manifest) -> UserError:
    """The error to raise if no utterance has a phone; it names a recording of a manifest and one of the alignments."""
    path = table.entries[0][0]
    parts = phones.sources.get(path)
    wanted = parts[0][2] if parts else os.path.realpath(table.root / path)
    return UserError(
        f"{alignments} has phones of none of the recordings of {tables}: its paths are relative to its own folder. "
        f"It has {min(phones.intervals)}, needed is e.g. {wanted}"
    )


def report(joint: npt.NDArray[np.int64], frames: int) -> dict[str, Any]:
    """The figures to print for a table of frame counts (phones, clusters) and a total number of frames."""
    measures = {name: round(value, 4) for name, value in purities(joint).items()}
    aligned = int(joint.sum())
    return {
        **measures,
        "frames": frames,
        "aligned_frames": aligned,
        "phones": int((joint.sum(1) > 0).sum()),
        "majority_phone_share": round(float(joint.sum(1).max()) / aligned, 4),
    }


def _read_alignments(file: Path) -> dict[str, Intervals]:
    """Phone intervals of each recording, by its real path."""
    if not file.is_file():
        raise UserError(f"no alignments at {file}")
    phones: dict[str, Intervals] = defaultdict(list)
    real: dict[str, str] = {}
    for number, line in read_lines(file, "alignments are lines of path, tier, start, end and label, with tabs between them"):
        fields = line.split("\t")
        start, end = (decimal(field.strip()) for field in fields[2:4]) if len(fields) == 5 else (None, None)
        if start is None or end is None:
            if number == 1 and len(fields) == 5 and start is end is None:  # the line of column names
                continue
            raise UserError(f"{file}, line {number}: expected path, tier, start, end, label, found {shown(line, 80)!r}")
        path, tier, _, _, label = fields
        if tier == "phone":
            if path not in real:
                real[path] = os.path.realpath(file.parent / path)
            phones[real[path]].append((start, end, label))
    if not phones:
        raise UserError(f"{file} has no interval in a tier 'phone'")
    return {path: sorted(spans) for path, spans in phones.items()}


def _sources(tables: Path) -> dict[str, Parts]:
    """The parts of each utterance, from parts.tsv; empty if there is none."""
    file, summary = tables / "parts.tsv", tables / "manifest.json"
    if not (file.is_file() and summary.is_file()):
        return {}
    source = read_json(summary, "make the manifest again").get("source")
    if not isinstance(source, str):
        raise UserError(f"{summary} names no folder of the recordings, 'source': make the manifest again")
    parts: dict[str, Parts] = defaultdict(list)
    for number, row in read_parts(file, ("utterance", "start", "end", "source")):
        start, end, begins = (decimal(row.get(name) or "0") for name in ("start", "end", "source_start"))
        if start is None or end is None or begins is None:
            raise UserError(f"{file}, line {number}: start, end and source_start are not numbers of seconds: make the manifest again")
        parts[row["utterance"]].append((start, end, os.path.realpath(os.path.join(source, row["source"])), begins))
    return parts


def _count(file: Path, table: Manifest, phones: Phones, rate: float, clusters: int) -> tuple[npt.NDArray[np.int64], int]:
    """Count (frames of each phone and cluster, all frames)."""
    joint = np.zeros((len(phones.inventory), clusters), dtype=np.int64)
    if not file.is_file():
        raise UserError(f"{file} cannot be read, labels.json beside it lists that split: make the labels again")
    lines = [line for _, line in read_lines(file, HINT)]
    if len(lines) != len(table.entries):
        raise UserError(f"{file} has {len(lines)} lines, {table.path} lists {len(table.entries)} utterances: make the labels again")
    frames = 0
    for number, (line, (path, samples)) in enumerate(zip(lines, table.entries), start=1):
        labels = np.array([_label(v, clusters, file, number) for v in line.split()], dtype=np.int64)
        frames += len(labels)
        count_frames(joint, phones.of(table.root, path, samples, len(labels), rate), labels)
    return joint, frames


def count_frames(joint: npt.NDArray[np.int64], phones: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> None:
    """Add the frames of an utterance, with phones (T,), -1 for none, and labels (T,), to a table (phones, clusters)."""
    known = phones >= 0
    np.add.at(joint, (phones[known], labels[known]), 1)


def _label(text: str, clusters: int, file: Path, number: int) -> int:
    label = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if not 0 <= label < clusters:
        raise UserError(f"{file}, line {number}: {shown(text, 20)!r} is not a label from 0 to {clusters - 1}: make the labels again")
    return label
