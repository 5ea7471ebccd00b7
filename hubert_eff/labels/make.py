"""Makes labels of every split of a manifest: features, one k-means model for all, nearest centroids.

    LABELDIR/SPLIT.km            one line of space-separated cluster indices per line of SPLIT.tsv
    LABELDIR/dict.km.txt         `<index> <count>` for each cluster, in numeric order: a fairseq dictionary
    LABELDIR/kmeans.safetensors  the centroids
    LABELDIR/labels.json         source, layer, k, rate, seed, and figures of each split; written last

The work is cut into shards of about two minutes of audio, for several processes and for machines that share the folder. Each finished shard
is a file in a folder named after a digest of all settings, so an interrupted run resumes where it stopped, and runs with other settings
never mix.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import LOUDEST, SAMPLE_RATE
from ..data.lines import read_json
from ..data.tsv import Manifest, read_manifest
from ..errors import UserError, short, unknown
from ..utils.files import replacing, sync_folder, writable, write_json, write_text
from ..utils.progress import progress
from .classes import file_digest, read_dictionary
from .features import Array, Extractor, FeatureSource
from .kmeans import KINDS, KMeans, fit, fit_faiss, require
from .record import HINT, RECORD
from .workers import Entries, Pool, Task

MODEL = "kmeans.safetensors"
SHARD_SECONDS = 120
WAIT_SECONDS = 5.0  # time between two checks for the k-means model of another job
VERSION = 1  # of the settings in the digest


def make_labels(
    manifest: str | Path,
    out: str | Path,
    source: FeatureSource | None = None,
    clusters: int = 100,
    splits: Iterable[str] | None = None,
    fit_split: str = "train",
    fit_hours: float = 10.0,
    seed: int = 1,
    workers: int = 1,
    share: tuple[int, int] | None = None,
    kmeans: str = "minibatch",
) -> dict[str, Any]:
    """Cluster the frames of `fit_split` and label all splits.

    Args:
        manifest: folder of TSVs.
        out: folder for the labels; it may be the same.
        source: the features (default: MFCC); for a trained encoder at 25 or 100 Hz, labels.json also holds `teacher_rate` and
            `teacher_frames`.
        clusters: number of labels, k.
        splits: names of TSVs (default: all in `manifest`).
        fit_split: split that k-means is fitted on.
        fit_hours: maximum hours of it; utterances are drawn at random, and their features are kept on disk while k-means runs.
        seed: seed of that draw and of k-means.
        workers: processes.
        share: (I, N) labels only every N-th shard from the I-th, counted from 0; a call without `share` then collects them. Share 0 also
            fits k-means, and the others wait for it.
        kmeans: "minibatch", or "faiss" if it is installed (it holds all frames of `fit_hours` in memory).

    Returns:
        The content of labels.json, with `reused`: whether everything existed already. With `share`, unless everything existed: `rank`,
        `nshard`, the number of `shards`, and how many of them are `finished`.

    Raises:
        UserError: there is no manifest, an utterance is shorter than one frame, audio differs from its manifest, there are more clusters
            than frames, a checkpoint or layer cannot be read, or labels of another run would be mixed with these.
    """
    source = source or FeatureSource()
    if clusters < 2 or workers < 1 or fit_hours <= 0 or source.batch_seconds <= 0:
        raise UserError("--clusters must be at least 2, --workers at least 1, --fit-hours and --batch-seconds above 0")
    if kmeans not in KINDS:
        raise unknown("value of --kmeans", kmeans, KINDS)
    require(kmeans)
    if share and not 0 <= share[0] < share[1]:
        raise UserError(f"--rank {share[0]} must be from 0 to {share[1] - 1}: --nshard counts the jobs, --rank numbers them from 0")
    folder, target = Path(manifest), Path(out)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name one made by `hubert-eff manifest`")
    names = sorted(set(splits)) if splits else sorted(f.stem for f in folder.glob("[!.]*.tsv") if _is_manifest(f))
    if not names:
        raise UserError(f"no manifest in {folder}: it must hold train.tsv, made by `hubert-eff manifest`")
    tables = {name: read_manifest(folder / f"{name}.tsv") for name in names}
    fitted = tables.get(fit_split) or read_manifest(folder / f"{fit_split}.tsv")
    with progress(f"loading {source.checkpoint or 'MFCC'}", 1):
        extractor = source.open()
    for table in {**tables, fit_split: fitted}.values():
        _check_lengths(table, extractor)
    sample = drawn(fitted, fit_hours, seed)
    frames = sum(extractor.frames(samples) for _, samples in sample)
    if frames < clusters:
        raise UserError(
            f"--clusters {clusters} needs as many frames, {fitted.path} has {frames}: ask for fewer clusters or give more audio"
        )
    settings = {
        **extractor.identity(), "k": clusters, "rate": extractor.rate, "seed": seed, "fit_split": fit_split,
        "fit_hours": fit_hours, **({"kmeans": kmeans} if kmeans != "minibatch" else {}),
    }  # fmt: skip
    # the content of a checkpoint matters, not its path
    identity = {k: v for k, v in settings.items() if k != "checkpoint"} | {"fit_tsv": fitted.digest, "version": VERSION}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    work = target / f".labels-{key}"
    earlier = _earlier(target, key, names)
    done = {n: earlier[n] for n in names if n in earlier and earlier[n].get("tsv_sha256") == tables[n].digest}
    todo = [n for n in names if n not in done]
    if not todo:
        shutil.rmtree(work, ignore_errors=True)  # a run that was killed at its very end leaves it
        return {**read_json(target / RECORD, HINT), "reused": True}

    writable(work)
    pool = Pool(source, workers, extractor)
    if share and share[0] > 0:
        model = _awaited(work, target, key)
    else:
        model = _found(work, target, key) or _fitted(work, key, sample, fitted.root, clusters, seed, pool, kmeans)
    shards = {n: shards_of(tables[n], work, n) for n in todo}
    tasks = [task for n in todo for task in shards[n]]
    mine = tasks[share[0] :: share[1]] if share else tasks
    pool.run(partial(_label_shard, model=model), mine, "labeling utterances")
    if share:
        finished = sum(task[0].exists() for task in tasks)
        return {"rank": share[0], "nshard": share[1], "shards": len(tasks), "finished": finished, "reused": False}

    # everything is assembled inside `work` and then moved, so a killed run leaves nothing half-done elsewhere
    counts = {n: _collect(work / f"{n}.km", shards[n], clusters) for n in todo}
    made = [MODEL, *(f"{n}.km" for n in todo)]
    if fit_split in counts or not (target / "dict.km.txt").exists() or not earlier:
        tally = counts.get(fit_split, sum(counts.values()))
        write_text(work / "dict.km.txt", "".join(f"{i} {c}\n" for i, c in enumerate(tally)))
        made.append("dict.km.txt")
    figures = {n: _figures(tables[n], counts[n], work / f"{n}.km") for n in todo}
    summary = {
        **settings,
        "fit_frames": frames,
        "settings": key,
        "manifest": str(folder.absolute()),
        "splits": {**earlier, **figures},
    }
    write_json(work / RECORD, summary)
    (target / RECORD).unlink(missing_ok=True)  # until it is back, the folder is incomplete
    for name in (*made, RECORD):
        if (work / name).exists():  # the model may have been moved already
            os.replace(work / name, target / name)
    sync_folder(target)
    shutil.rmtree(work)
    if not any(target.glob(".hubert-eff-rank-*.lock")):  # other machines may be working
        for left in target.glob(".labels-*"):  # abandoned runs with other settings
            shutil.rmtree(left, ignore_errors=True)
    return {**summary, "reused": False}


def _is_manifest(file: Path) -> bool:
    """Whether the first line is a folder; other tables (parts.tsv, transcripts.tsv) start with several columns."""
    if not file.is_file():
        return False
    with file.open("rb") as lines:
        return b"\t" not in lines.readline(1 << 16).rstrip()


def _check_lengths(table: Manifest, extractor: Extractor) -> None:
    for number, (path, samples) in enumerate(table.entries, start=2):
        if extractor.frames(samples) < 1:
            raise UserError(
                f"{table.path}, line {number}: {path} has {samples} samples, shorter than one label frame (25 ms): "
                "make the manifest again with `hubert-eff manifest`"
            )


def drawn(table: Manifest, hours: float, seed: int) -> Entries:
    """The utterances that k-means is fitted on."""
    entries = list(table.entries)
    random.Random(f"fit {seed}").shuffle(entries)
    left = hours * 3600 * SAMPLE_RATE
    chosen: Entries = []
    for entry in entries:
        chosen.append(entry)
        left -= entry[1]
        if left <= 0:
            break
    return chosen


def cut(entries: Iterable[tuple[str, int]]) -> list[Entries]:
    """Cut utterances into shards of `SHARD_SECONDS`, or up to one utterance more."""
    shards: list[Entries] = [[]]
    held = 0
    for entry in entries:
        if held >= SHARD_SECONDS * SAMPLE_RATE:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += entry[1]
    return shards


def shards_of(table: Manifest, work: Path, name: str) -> list[Task]:
    """The shards of a split: files in `work`, in order, and their utterances."""
    return [(work / f"{name}-{table.digest[:12]}-{i:06d}.km", table.root, e) for i, e in enumerate(cut(table.entries))]


def _earlier(target: Path, key: str, names: list[str]) -> dict[str, Any]:
    """Figures of the splits in `target` that were made with the same settings and have not changed."""
    try:
        found = read_json(target / RECORD, HINT)
    except UserError:
        return {}
    splits = found.get("splits")
    present = {n: s for n, s in splits.items() if (target / f"{n}.km").is_file()} if isinstance(splits, dict) else {}
    if found.get("settings") == key:
        return {n: s for n, s in present.items() if _is_whole(target / f"{n}.km", s)} if _has_dictionary(target, found.get("k")) else {}
    foreign = sorted(set(present) - set(names))
    if foreign:
        raise UserError(
            f"{target} holds labels of {', '.join(foreign)} made with other settings (k={found.get('k')}, "
            f"source {found.get('source')}): name another --out, or label all splits again"
        )
    return {}


def _is_whole(labels: Path, figures: Any) -> bool:
    """Whether labels are unchanged since they were made; older records do not say."""
    return isinstance(figures, dict) and figures.get("km_sha256") in (None, file_digest(labels))


def _has_dictionary(target: Path, clusters: object) -> bool:
    """Whether the dictionary and the model of existing labels exist."""
    try:
        return len(read_dictionary(target / "dict.km.txt")) == clusters and (target / MODEL).is_file()
    except UserError:
        return False


# ---- a shard


def _features(task: Task, extractor: Extractor) -> list[Array]:
    """Features of the utterances of a task, in order."""
    _, root, entries = task
    found = dict(extractor.extract([read_audio(root / path, samples) for path, samples in entries]))
    return [found[i] for i in range(len(entries))]


def read_audio(path: Path, samples: int) -> Array:
    """Read an utterance. Raises `UserError` if it differs from its manifest."""
    import soundfile

    try:
        audio, rate = soundfile.read(path, dtype="float32")
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{short(path)} cannot be read any more: make the manifest again") from error
    if rate != SAMPLE_RATE or audio.shape != (samples,):
        raise UserError(
            f"{path} is not what its manifest says: {audio.shape[0]} samples at {rate} Hz, expected {samples} at {SAMPLE_RATE} "
            "in mono: make the manifest again"
        )
    if not max(audio.max(initial=0.0), -audio.min(initial=0.0)) <= LOUDEST:  # also of NaN
        raise UserError(f"{path} holds samples that are not finite or not audio: make the manifest again")
    return np.asarray(audio, dtype=np.float32)


def _feature_shard(task: Task, extractor: Extractor) -> int:
    with replacing(task[0]) as temporary:
        np.save(temporary, np.concatenate(_features(task, extractor)))
    return len(task[2])


def _label_shard(task: Task, extractor: Extractor, model: KMeans) -> int:
    lines = (" ".join(map(str, model.assign(f).tolist())) for f in _features(task, extractor))
    write_text(task[0], "".join(f"{line}\n" for line in lines))
    return len(task[2])


def _found(work: Path, target: Path, key: str) -> KMeans | None:
    """The k-means model of an earlier run with these settings."""
    for place in (work, target):
        file = place / MODEL
        if file.is_file():
            model = KMeans.read(file)
            if model.metadata.get("settings") == key:
                return model
    return None


def _awaited(work: Path, target: Path, key: str) -> KMeans:
    """Wait for the k-means model that another job fits."""
    model = _found(work, target, key)
    if model is None:
        print(f"waiting for the k-means model of --rank 0, {work / 'kmeans.safetensors'}", file=sys.stderr, flush=True)
    while model is None:
        time.sleep(WAIT_SECONDS)
        model = _found(work, target, key)
    return model


def _fitted(work: Path, key: str, sample: Entries, root: Path, clusters: int, seed: int, pool: Pool, kmeans: str) -> KMeans:
    tasks = [(work / f"fit-{i:06d}.npy", root, entries) for i, entries in enumerate(cut(sample))]
    pool.run(_feature_shard, tasks, "features to cluster")
    files = [t[0] for t in tasks]
    model = KMeans(fit_faiss(files, clusters, seed) if kmeans == "faiss" else fit(files, clusters, seed), {"settings": key})
    model.save(work / MODEL)
    for file in files:
        file.unlink()
    return model


# ---- results


def _collect(target: Path, shards: list[Task], clusters: int) -> Any:
    """Join the shards; returns the number of frames of each cluster."""
    counts = np.zeros(clusters, dtype=np.int64)
    with replacing(target) as temporary, temporary.open("wb") as out:
        for file, _, entries in shards:
            raw = file.read_bytes()
            odd = raw.translate(None, b"0123456789 \n") or raw.count(b"\n") != len(entries) or not raw.endswith(b"\n")
            labels = np.fromstring(b"" if odd else raw, dtype=np.int64, sep=" ")
            if not labels.size or labels.max() >= clusters:
                file.unlink()
                raise UserError(f"{file} is damaged and was removed: run the same `hubert-eff labels` again to make it")
            out.write(raw)
            counts += np.bincount(labels, minlength=clusters)
    return counts


def _figures(table: Manifest, counts: Any, labels: Path) -> dict[str, Any]:
    frames = int(counts.sum())
    return {
        "utterances": len(table.entries),
        "frames": frames,
        "majority_share": round(float(counts.max()) / frames, 6),
        "used_clusters": int((counts > 0).sum()),
        "tsv_sha256": table.digest,
        "content_sha256": table.content_digest(),
        "km_sha256": file_digest(labels),
    }
