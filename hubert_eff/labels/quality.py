"""How well labels agree with phones: the measures of HuBERT (Hsu et al., 2021, section IV-C).

From the joint distribution p(y, z) of phone y and cluster z over frames:

    phone purity     sum_z p(z) max_y p(y | z)    accuracy of the best map from clusters to phones
    cluster purity   sum_y p(y) max_z p(z | y)    its counterpart; falls as clusters grow in number
    PNMI             I(y; z) / H(y)               share of the uncertainty about the phone that the cluster removes

A frame belongs to the phone at its centre; frames in no phone interval are left out.
"""

from __future__ import annotations

import csv
import json
import os
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from .features import CENTRE
from .targets import Manifest, read_manifest

Intervals = list[tuple[float, float, str]]  # start s, end s, label; in order of time
Parts = list[tuple[float, float, str, float]]  # start s, end s, real path of the recording, second of it that is heard at the start


def purities(joint: npt.NDArray[np.floating[Any] | np.integer[Any]]) -> dict[str, float]:
    """Measures of a table of frame counts (phones, clusters)."""
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
        alignments: `path <tab> tier <tab> start s <tab> end s <tab> label` lines, the phones in tier "phone"; paths are relative to
            the file's folder and name the recordings, also where the manifest's utterances were converted or joined from them.
        manifest: folder of the manifests (default: the one that labels.json names).

    Returns:
        Per split and for "all": the three measures, frames, frames with a phone, phones, share of the most frequent phone.

    Raises:
        UserError: a file that is missing or malformed, labels that do not belong to the manifest, no recording with phones.
    """
    folder = Path(labels)
    try:
        info = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        rate, clusters, splits = float(info["rate"]), int(info["k"]), list(info["splits"])
        tables = Path(manifest or info["manifest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no labels in {folder}: it needs the labels.json of `hubert-eff labels`") from error
    phones = _read_alignments(Path(alignments))
    inventory = {label: i for i, label in enumerate(sorted({s[2] for spans in phones.values() for s in spans}))}
    sources = _sources(tables)
    result: dict[str, Any] = {}
    total = np.zeros((len(inventory), clusters), dtype=np.int64)
    total_frames = 0
    for name in splits:
        joint, frames = _count(folder / f"{name}.km", read_manifest(tables / f"{name}.tsv"), sources, phones, inventory, rate, clusters)
        total += joint
        total_frames += frames
        if joint.any():
            result[name] = _report(joint, frames)
    if not total.any():
        raise UserError(f"{alignments} has phones of none of the recordings of {tables}: its paths are relative to its own folder")
    return {"labels": str(folder), "k": clusters, "rate": rate, "splits": result, "all": _report(total, total_frames)}


def _report(joint: npt.NDArray[np.int64], frames: int) -> dict[str, Any]:
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
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("\t")
        try:
            path, tier, start, end, label = fields
            span = (float(start), float(end), label)
        except ValueError as error:
            if number == 1 and len(fields) == 5:  # names of the columns
                continue
            raise UserError(f"{file}, line {number}: expected path, tier, start, end, label, found {line[:80]!r}") from error
        if tier == "phone":
            if path not in real:
                real[path] = os.path.realpath(file.parent / path)
            phones[real[path]].append(span)
    if not phones:
        raise UserError(f"{file} has no interval in a tier 'phone'")
    return {path: sorted(spans) for path, spans in phones.items()}


def _sources(tables: Path) -> dict[str, Parts]:
    """What each utterance is made of, from parts.tsv; empty where there is none."""
    file, summary = tables / "parts.tsv", tables / "manifest.json"
    if not (file.is_file() and summary.is_file()):
        return {}
    root = Path(json.loads(summary.read_text(encoding="utf-8"))["source"])
    parts: dict[str, Parts] = defaultdict(list)
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            begins = float(row.get("source_start") or 0)
            parts[row["utterance"]].append((float(row["start"]), float(row["end"]), os.path.realpath(root / row["source"]), begins))
    return parts


def _count(
    file: Path,
    table: Manifest,
    sources: dict[str, Parts],
    phones: dict[str, Intervals],
    inventory: dict[str, int],
    rate: float,
    clusters: int,
) -> tuple[npt.NDArray[np.int64], int]:
    """(frames of each phone and cluster, frames in all)."""
    joint = np.zeros((len(inventory), clusters), dtype=np.int64)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read, labels.json beside it lists that split: make the labels again") from error
    if len(lines) != len(table.entries):
        raise UserError(f"{file} has {len(lines)} lines, {table.file} lists {len(table.entries)} utterances: make the labels again")
    frames = 0
    for number, (line, (path, samples)) in enumerate(zip(lines, table.entries), start=1):
        labels = [_label(v, clusters, file, number) for v in line.split()]
        frames += len(labels)
        whole: Parts = [(0.0, samples, os.path.realpath(table.root / path), 0.0)]
        spans = [
            (begin + max(start - first, 0.0), min(begin + end - first, finish), inventory[label])
            for begin, finish, source, first in sources.get(path, whole)
            for start, end, label in phones.get(source, [])
            if end > first and start - first < finish - begin
        ]
        starts = [s[0] for s in spans]
        for index, cluster in enumerate(labels):
            time = index / rate + CENTRE
            at = bisect_right(starts, time) - 1
            if at >= 0 and time < spans[at][1]:
                joint[spans[at][2], cluster] += 1
    return joint, frames


def _label(text: str, clusters: int, file: Path, number: int) -> int:
    try:
        label = int(text)
    except ValueError:
        label = -1
    if not 0 <= label < clusters:
        raise UserError(f"{file}, line {number}: {text[:20]!r} is no label from 0 to {clusters - 1}: make the labels again")
    return label
