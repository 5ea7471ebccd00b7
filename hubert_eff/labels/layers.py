"""Compares the hidden states of an encoder as labels: k-means of each and its agreement with phones, from one pass."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.lines import read_json
from ..data.tsv import Manifest, read_manifest
from ..errors import UserError
from ..utils.files import temporary_folder, writable, write_json
from ..utils.progress import progress
from .features import Extractor, FeatureSource, HiddenLayer
from .kmeans import KMeans, fit, require
from .make import cut, drawn, read_audio
from .quality import Phones, count_frames, foreign_alignments, report
from .record import HINT, RECORD
from .workers import Entries, Pool, Task

CLUSTERS = 500
HELD_OUT, FITTED = "valid", "train"
DISK_SHARE = 0.9  # share of the free disk space that features may take


@dataclass(frozen=True)
class LayerChoice:
    """What to compare.

    Args:
        checkpoint: the encoder, see `labels.teachers` (default: that of the labels in the folder).
        layers: numbers of hidden states; empty: all.
        clusters: number of clusters (default: that of the labels in the folder, or 500).
        fit_split: split that k-means is fitted on.
        splits: splits that are measured (default: valid, or else the one that k-means is fitted on).
        hours: maximum hours of each split; utterances are drawn at random.
        seed: seed of that draw and of k-means.
    """

    checkpoint: str | None = None
    layers: tuple[int, ...] = ()
    clusters: int | None = None
    fit_split: str = FITTED
    splits: tuple[str, ...] = ()
    hours: float = 1.0
    seed: int = 1


def layer_quality(
    folder: str | Path,
    alignments: str | Path,
    choice: LayerChoice | None = None,
    manifest: str | Path | None = None,
    workers: int = 1,
    device: str = "cpu",
    batch_seconds: float = 60.0,
) -> dict[str, Any]:
    """Fit k-means on each hidden state of an encoder, and measure how well its labels agree with phones.

    The encoder runs once over the audio; its states, 4 bytes per channel and frame, are kept in `folder`/.layers-DIGEST meanwhile. A run
    that was killed resumes there.

    Args:
        folder: a folder of labels, or of manifests.
        alignments: see `label_quality`.
        choice: what to compare.
        manifest: folder of the manifests (default: `folder`, or the one that its labels.json names).
        workers, device, batch_seconds: see `make_labels` and `FeatureSource`.

    Returns:
        `checkpoint`, `k`, `fit_frames`; under `layers`, for each layer, its number, rate, channels, used clusters, and the measures of
        `label_quality` for each split and for all; `best`, the layer with the highest PNMI.

    Raises:
        UserError: `label_quality` or `make_labels` would fail, no encoder is named, or the disk is too small.
    """
    choice = choice or LayerChoice()
    if choice.hours <= 0 or workers < 1 or batch_seconds <= 0:
        raise UserError("--fit-hours and --batch-seconds must be above 0, --workers at least 1")
    require("minibatch")
    folder = Path(folder)
    made = read_json(folder / RECORD, HINT) if (folder / RECORD).is_file() else {}
    name, clusters = choice.checkpoint or made.get("checkpoint"), choice.clusters or made.get("k") or CLUSTERS
    if not isinstance(name, str):
        raise UserError(f"--checkpoint is missing: {folder} holds no labels of an encoder, name the one whose layers are to be compared")
    if not isinstance(clusters, int) or clusters < 2:
        raise UserError(f"--clusters {clusters} must be at least 2")
    tables = Path(manifest or made.get("manifest") or folder)
    splits = choice.splits or ((HELD_OUT,) if (tables / f"{HELD_OUT}.tsv").is_file() else (choice.fit_split,))
    manifests = {split: read_manifest(tables / f"{split}.tsv") for split in (choice.fit_split, *splits)}
    samples = {split: drawn(table, choice.hours, choice.seed) for split, table in manifests.items()}
    phones = Phones.read(Path(alignments), tables, clusters)

    source = FeatureSource(name, choice.layers, device, batch_seconds)
    with progress(f"loading {name}", 1):
        extractor = source.open()
    assert isinstance(extractor, HiddenLayer)
    layers = extractor.layers
    frames = {split: sum(extractor.frames(n) for _, n in sample) for split, sample in samples.items()}
    if frames[choice.fit_split] < clusters:
        raise UserError(f"--clusters {clusters} needs as many frames, {choice.fit_split} has {frames[choice.fit_split]}")
    wanted = {split: _phones(phones, manifests[split], samples[split], extractor) for split in splits}
    if not any((known >= 0).any() for found in wanted.values() for known in found):
        raise foreign_alignments(alignments, tables, phones, manifests[splits[0]])
    widths = extractor.teacher.widths(layers)
    settings = {
        **{key: value for key, value in extractor.identity().items() if key not in ("checkpoint", "layer")}, "layers": list(layers),
        "k": clusters, "seed": choice.seed, "hours": choice.hours, "fit": choice.fit_split, "splits": list(splits),
        "tsv": {split: table.digest for split, table in manifests.items()},
    }  # fmt: skip
    work = folder / f".layers-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]}"
    writable(work)
    _check_disk(work, sum(frames.values()) * sum(widths) * 4)

    tasks = {
        split: [(work / f"{split}-{i:06d}", manifests[split].root, entries) for i, entries in enumerate(cut(sample))]
        for split, sample in samples.items()
    }
    Pool(source, workers, extractor).run(_state_shard, [task for each in tasks.values() for task in each], "hidden states of all layers")
    found = []
    for place, layer in enumerate(layers):
        file = work / f"layer-{layer}.json"
        if not file.is_file():
            of_layer = partial(_files, place=place)
            model = KMeans(fit(of_layer(tasks[choice.fit_split]), clusters, choice.seed), {})
            measured = _measured(model, {split: of_layer(tasks[split]) for split in splits}, wanted, len(phones.inventory))
            write_json(file, {"layer": layer, "rate": extractor.teacher.rates[layer], "channels": widths[place], **measured})
        found.append(read_json(file, "run the same command again"))
    for left in folder.glob(".layers-*"):  # also those of abandoned comparisons
        shutil.rmtree(left, ignore_errors=True)
    best = max(found, key=lambda row: float(row["all"]["pnmi"]))["layer"]
    return {
        "checkpoint": name, "k": clusters, "fit_split": choice.fit_split, "fit_frames": frames[choice.fit_split], "splits": list(splits),
        "layers": found, "best": best,
    }  # fmt: skip


def _phones(phones: Phones, table: Manifest, sample: Entries, extractor: Extractor) -> list[Any]:
    return [phones.of(table.root, path, n, extractor.frames(n), extractor.rate) for path, n in sample]


def _check_disk(folder: Path, needed: int) -> None:
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if needed - held > DISK_SHARE * free:
        raise UserError(
            f"the states of all layers take {needed / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free: lower --fit-hours, or name "
            "fewer --layers"
        )


def _state_shard(task: Task, extractor: HiddenLayer) -> int:
    """Write the states of some utterances: a folder with an array (frames, channels) per layer, and with the frames of each utterance."""
    target, root, entries = task
    found = dict(extractor.extract_all([read_audio(root / path, samples) for path, samples in entries]))
    with temporary_folder(target) as folder:
        for place in range(len(extractor.layers)):
            np.save(folder / f"{place}.npy", np.concatenate([found[i][place] for i in range(len(entries))]))
        folder.rename(target)
    return len(entries)


def _files(tasks: Sequence[Task], place: int) -> list[Path]:
    return [task[0] / f"{place}.npy" for task in tasks]


def _measured(model: KMeans, files: dict[str, list[Path]], phones: dict[str, list[Any]], rows: int) -> dict[str, Any]:
    """The figures of each split and of all."""
    clusters = len(model.centroids)
    total, figures, used = np.zeros((rows, clusters), dtype=np.int64), {}, np.zeros(clusters, dtype=np.int64)
    for split, parts in files.items():
        joint = np.zeros_like(total)
        labels = np.concatenate([model.assign(np.load(part)) for part in parts])
        count_frames(joint, np.concatenate(phones[split]), labels)
        used += np.bincount(labels, minlength=clusters)
        total += joint
        if joint.any():
            figures[split] = report(joint, len(labels))
    return {"used_clusters": int((used > 0).sum()), "splits": figures, "all": report(total, int(used.sum()))}
